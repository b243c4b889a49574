"""GSM-Symbolic templates: drawn problems obey their conditions, and worked solutions agree with the answer."""

import re
from random import Random

import pytest

from fourfold.problems.expression import ExpressionError
from fourfold.problems.gsm_symbolic import draw_rows
from fourfold.problems.template import Template, check_calculation

VALUES: dict[str, list[object]] = {"names": ["Ada", "Ben"], "fraction_alnum": [["half", "1/2"], ["one third", "1/3"]]}
QUESTION = """
{name,Tom} has {n,12} boxes with {k,6} eggs. he gives {frac_txt,half} of all eggs away. How many {thing,eggs} are left?

#init:
- name = sample(names)
- thing = sample(["eggs", "pens"])
- $n = range(2, 30)
- $k = range(2, 30)
- frac_txt, frac = sample(fraction_alnum)

#conditions:
- is_int(n * k * frac)
- n > k

#answer: n * k - n * k * frac
"""
ANSWER = """
The boxes hold {n} * {k} = <<{n}*{k}={n*k}>>{n*k} {thing}.
Away go {frac} of {n*k}, so {n*k} - {n*k*frac} = <<{n*k}-{n*k*frac}={n*k-n*k*frac}>>{n*k-n*k*frac} are left.
#### {n*k-n*k*frac}
"""


def toml(question: str = QUESTION, answer: str = ANSWER) -> str:
    return f"question_annotated = '''{question}'''\nanswer_annotated = '''{answer}'''\n"


def test_drawn_problems_are_right() -> None:
    rows = draw_rows(toml(), "0007", VALUES, 50, Random(0))
    assert len(rows) == 50
    assert len({row.problem for row in rows}) == 50
    for row in rows:
        n, k = map(int, re.findall(r"(\d+) boxes with (\d+)", row.problem)[0])
        part = 2 if "half" in row.problem else 3
        assert n > k
        assert n * k % part == 0
        answer = n * k - n * k // part
        assert row.answer == str(answer)
        assert row.solution.endswith(f"\n#### {answer}")
        assert f"Away go 1/{part} of" in row.solution
        assert "<<" not in row.solution
        assert "{" not in row.problem + row.solution
        assert ". He gives" in row.problem
        assert row.group == "0007"


def test_the_seed_alone_decides() -> None:
    first, again, other = (draw_rows(toml(), "a", VALUES, 5, Random(seed)) for seed in ("x", "x", "y"))
    assert first == again
    assert first != other


def test_a_template_with_few_problems_gives_what_there_are() -> None:
    question = QUESTION.replace("range(2, 30)", "range(2, 5)")
    rows = draw_rows(toml(question), "a", VALUES, 200, Random(0))
    # n > k in 2..4 and a whole part: (4, 2), (4, 3), (3, 2) for halves, (4, 3), (3, 2) for thirds; 2 names, 2 things.
    assert len(rows) == (3 + 2) * 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#### {n*k-n*k*frac}", "#### {n*k}"),
        ("{n*k}>>", "{n*k+1}>>"),
        ("#### {n*k-n*k*frac}", "no answer"),
        ("#### {n*k-n*k*frac}", "#### {missing}"),
    ],
)
def test_contradicting_solutions_are_left_out(old: str, new: str, caplog: pytest.LogCaptureFixture) -> None:
    assert draw_rows(toml(answer=ANSWER.replace(old, new)), "a", VALUES, 5, Random(0)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sample(names)", "__import__('os').listdir('.')"),
        ("sample(names)", "sample(names).__class__"),
        ("n > k", "open('x')"),
        ("- $n = range(2, 30)", "- $n"),
        ("#answer:", "#result:"),
        ("#init:", "#start:"),
    ],
)
def test_hostile_or_broken_templates_are_left_out(old: str, new: str) -> None:
    assert draw_rows(toml(QUESTION.replace(old, new)), "a", VALUES, 5, Random(0)) == []
    with pytest.raises(ExpressionError):
        Template(QUESTION.replace(old, new), ANSWER, VALUES, Random(0))


def test_an_endless_search_is_bounded() -> None:
    assert draw_rows(toml(QUESTION.replace("n > k", "n > 100")), "a", VALUES, 1, Random(0)) == []


def test_placeholders_cannot_reach_python() -> None:
    rows = draw_rows(toml(QUESTION.replace("{name,Tom}", "{__class__,Tom}")), "a", VALUES, 3, Random(0))
    assert rows == []


@pytest.mark.parametrize(
    ("left", "right"), [("2*3", "6"), ("10/3", "3.33"), ("50%*10", "5"), ("2 pens", "7"), ("", "")]
)
def test_true_steps_pass(left: str, right: str) -> None:
    check_calculation(left, right)


@pytest.mark.parametrize(("left", "right"), [("2*3", "7"), ("10/3", "3.3"), ("1-2", "1")])
def test_false_steps_are_found(left: str, right: str) -> None:
    with pytest.raises(ExpressionError):
        check_calculation(left, right)
