"""Paired accuracy: known intervals, what few problems may say, and how often the interval covers the truth."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multinomial

from fourfold.fidelity.paired import interval, paired_difference, same_text


def requests(correct: dict[str, list[bool | None]], **changes: Any) -> list[dict[str, Any]]:
    """One request a value, all of one workload a problem."""
    place = {"concurrency": 4, "repeat": 0}
    return [
        {
            **place,
            "workload": i,
            "index": j,
            "problem_id": problem,
            "correct": value,
            "text": f"{problem} {j}",
            **changes,
        }
        for i, (problem, values) in enumerate(correct.items())
        for j, value in enumerate(values)
    ]


def test_the_interval_of_agresti_and_min_by_hand() -> None:
    # 100 problems: 20 gained, 8 lost. Half a count more in each of the four cells: n = 102, 20.5 and 8.5.
    low, high = interval([1] * 20 + [-1] * 8 + [0] * 72)
    middle = (20.5 - 8.5) / 102
    wald = math.sqrt(((20.5 + 8.5) / 102 - middle**2) / 102)
    assert (low + high) / 2 == pytest.approx(middle)
    # Student's t at 0.975 with 99 degrees of freedom, from tables.
    assert (high - low) / 2 == pytest.approx(1.98422 * wald, rel=1e-5)


@pytest.mark.parametrize(
    ("problems", "reach"),
    # t / (n + 2) with t from tables: nothing differed, and still little is known.
    [(2, 1.0), (3, 0.86053), (15, 0.12616), (98, 0.019847)],
)
def test_equal_answers_to_few_problems_do_not_make_engines_equal(problems: int, reach: float) -> None:
    found = paired_difference(*[requests({f"p{i}": [False] * 4 for i in range(problems)})] * 2)
    assert found is not None
    assert (found.difference, found.gained, found.lost) == (0, 0, 0)
    assert (found.low, found.high) == pytest.approx((-reach, reach), rel=1e-3)
    assert (found.problems, found.pairs) == (problems, 4 * problems)


def test_a_single_problem_tells_nothing() -> None:
    found = paired_difference(requests({"p": [True] * 50}), requests({"p": [False] * 50}))
    assert found is not None
    assert (found.difference, found.low, found.high, found.gained) == (1, -1, 1, 50)


def test_requests_are_paired_by_their_place_and_cancelled_ones_left_out() -> None:
    ours = requests({"a": [True, True, None], "b": [False, True, True]})
    theirs = requests({"a": [False, True, True], "b": [True, None, True]})
    found = paired_difference(ours, list(reversed(theirs)))
    assert found is not None
    assert (found.pairs, found.gained, found.lost) == (4, 1, 1)
    # a: (+1 + 0) / 2; b: (-1 + 0) / 2.
    assert found.difference == 0
    assert paired_difference(ours, requests({"c": [True]})) is None
    assert paired_difference(ours, requests({"a": [True], "b": [True]}, repeat=1)) is None


def test_answers_to_one_problem_are_no_problems_of_their_own() -> None:
    """Four answers each to 5 problems, all as the first: as wide as one answer each, and wider than 20 problems."""
    once = [{f"p{i}": [i < 2] for i in range(5)}, {f"p{i}": [i == 4] for i in range(5)}]
    often = [{name: values * 4 for name, values in side.items()} for side in once]
    apart = [{f"{name}-{j}": values for name, values in side.items() for j in range(4)} for side in once]
    widths = []
    for ours, theirs in (once, often, apart):
        found = paired_difference(requests(ours), requests(theirs))
        assert found is not None
        assert found.difference == pytest.approx(0.2)
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(widths[1])
    assert widths[2] < 0.5 * widths[1]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_the_interval_holds_what_was_seen_and_turns_round_with_its_sign(differences: list[float]) -> None:
    low, high = interval(differences)
    assert -1 <= low <= math.fsum(differences) / len(differences) <= high <= 1
    turned = interval([-d for d in differences])
    assert turned == pytest.approx((-high, -low))


@pytest.mark.parametrize(("problems", "least"), [(3, 0.99), (5, 0.92), (8, 0.89), (20, 0.87)])
def test_coverage(problems: int, least: float) -> None:
    """By enumeration of all outcomes, not by drawing: the chance that the interval holds the true difference."""
    outcomes = [(b, c, problems - b - c) for b in range(problems + 1) for c in range(problems + 1 - b)]
    intervals = [interval([1] * b + [-1] * c + [0] * rest) for b, c, rest in outcomes]
    chances = []
    for gained, lost in itertools.product((0.0, 0.05, 0.1, 0.2, 0.3, 0.45), repeat=2):
        probabilities = multinomial.pmf(outcomes, problems, [gained, lost, 1 - gained - lost])
        truth = gained - lost
        held = [low - 1e-9 <= truth <= high + 1e-9 for low, high in intervals]
        chances.append(sum(p for p, inside in zip(probabilities, held, strict=True) if inside))
    assert min(chances) >= least
    assert sum(chances) / len(chances) >= 0.95


def test_same_text() -> None:
    ours, theirs = requests({"a": [True, False, None]}), requests({"a": [True, True, True]})
    assert same_text(ours, theirs) == (2, 2)
    theirs[1]["text"] += "!"
    assert same_text(ours, theirs) == (1, 2)
