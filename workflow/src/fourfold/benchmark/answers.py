"""Final answers: finding them in a generated text, and comparing them with the expected ones.

An answer is compared exactly where both sides are plain numbers, and by math-verify (sympy) otherwise.
"""

import logging
import re
from fractions import Fraction

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_MARKED = re.compile(r"(?:final\s+answer|answer)\s*(?:is|=|:)+\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LAST_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
_CURRENCY = re.compile(r"\\?[$€£¥]|(?<=\d)\s*(?:USD|EUR|GBP)\b")
_MARKUP = re.compile(r"\*\*|__|`")
_MIXED = re.compile(r"^(?P<sign>[-+]?)(?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)$")
_LATEX_FRACTION = re.compile(r"^(?P<sign>[-+]?)\\[dt]?frac\{(?P<over>-?\d+)\}\{(?P<under>-?\d+)\}$")
# A unit has two letters or more: 2x and 3 pi are products.
_WORDS_AFTER_NUMBER = re.compile(
    rf"^(?P<number>{NUMBER}(?:\s*/\s*\d+)?)\s*"
    r"(?:\\text\{[^}]*\}|(?!(?:pi|sqrt|log|ln|sin|cos|tan|exp|mod|or|and)\b)[^\W\d_]{2,}[^\d=<>^_\\]*)$"
)
MAX_LENGTH = 200
"""Characters beyond which a text is no final answer."""


def extract_answer(text: str) -> str | None:
    r"""The final answer that a text states, as it is written there; None if it states none.

    The last explicit mark wins: `\boxed{…}`, `#### …` or "the answer is …". A text without a mark gives its last
    number.
    """
    found: list[tuple[int, str]] = []
    for start in _BOXED.finditer(text):
        content = _braced(text, start.end())
        if content is not None:
            found.append((start.start(), content))
    for pattern in (_HASHES, _MARKED):
        found += [(match.start(), match["answer"]) for match in pattern.finditer(text)]
    # "The answer is \boxed{5}" has two marks for one answer: the box, which starts later, wins.
    for _, answer in sorted(found, reverse=True):
        cleaned = _clean(answer)
        if cleaned and len(cleaned) <= MAX_LENGTH:
            return cleaned
    numbers = _LAST_NUMBER.findall(text)
    return _clean(numbers[-1]) if numbers else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; None if it is never closed."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _clean(answer: str) -> str:
    """Without markup, math delimiters, and punctuation at the end."""
    answer = _MARKUP.sub("", answer).replace("\u2212", "-").strip()
    for begin, end in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
        inner = answer.rstrip(".,;:! ")
        if inner.startswith(begin) and inner.endswith(end) and len(inner) >= len(begin) + len(end):
            answer = inner[len(begin) : -len(end)].strip()
    return answer.rstrip(".,;:! ").strip()


def normalise(answer: str) -> str:
    """An answer without currency signs, units behind a number, thousands separators and LaTeX spacing."""
    answer = _CURRENCY.sub("", _clean(answer))
    answer = answer.replace(r"\!", "").replace(r"\,", "").replace("{,}", ",").replace("\u00a0", " ").strip()
    unit = _WORDS_AFTER_NUMBER.match(answer)
    if unit and unit["number"].strip():
        answer = unit["number"].strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer):
        answer = answer.replace(",", "")
    return answer


def as_number(answer: str) -> Fraction | None:
    """The exact value of a plain number, fraction or mixed number (normalised); None for anything else."""
    if mixed := _MIXED.match(answer):
        if int(mixed["under"]) == 0:
            return None
        value = int(mixed["whole"]) + Fraction(int(mixed["over"]), int(mixed["under"]))
        return -value if mixed["sign"] == "-" else value
    if latex := _LATEX_FRACTION.match(answer):
        answer = f"{latex['over']}/{latex['under']}" if not latex["under"].startswith("-") else ""
        value_or_none = as_number(answer)
        return -value_or_none if value_or_none is not None and latex["sign"] == "-" else value_or_none
    if not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:\s*/\s*\d+)?", answer):
        return None
    over, _, under = answer.partition("/")
    try:
        return Fraction(over.strip()) / Fraction(under.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(answer: str | None, expected: str) -> bool:
    """Whether an extracted answer equals the expected one.

    It may run for as long as sympy wants: `checker.AnswerChecker` bounds it. Nothing here uses signals.
    """
    if not answer:
        return False
    left, right = normalise(answer), normalise(expected)
    if left.casefold() == right.casefold():
        return True
    number, wanted = as_number(left), as_number(right)
    if number is not None and wanted is not None:
        return number == wanted
    return _math_verify(left, right)


def _math_verify(answer: str, expected: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Without the dollar signs, math-verify picks the first number out of an expression: 2 from 2\sqrt{2}.
    parsed = [parse(f"${side}$", parsing_timeout=None) for side in (expected, answer)]
    return bool(all(parsed) and verify(parsed[0], parsed[1], timeout_seconds=None))
