"""Answers: extraction from generated text and comparison with the expected answer."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.benchmark.answers import as_number, extract_answer, normalise, same_answer
from fourfold.benchmark.checker import AnswerChecker


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12*20 = 240\n#### 240", "240"),
        ("so we get #### 1,234.", "1,234"),
        (r"Thus \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"First \boxed{1}, no: $\boxed{2}$", "2"),
        (r"\boxed{5} is wrong.\n#### 7".replace(r"\n", "\n"), "7"),
        (r"The answer is \boxed{12}.", "12"),
        ("The final answer is: **42**.", "42"),
        ("The answer is $18.", "$18"),
        ("Answer: -3", "-3"),
        ("the answer is \\(x^2\\).", "x^2"),
        ("She has 3 apples and 4 pears, so 7 fruits in total.", "7"),
        ("It costs 1,250.50 in all", "1,250.50"),
        ("That is 25% of them", "25%"),
        ("The temperature is \u22125", "5"),
        ("#### \u22125", "-5"),
        (r"unclosed \boxed{12", "12"),
        (r"\boxed{}", None),
        ("no number here", None),
        ("", None),
    ],
)
def test_extracts_what_the_text_states(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("240", "240"),
        ("1,000", "1000"),
        ("$18", "18"),
        (r"\$18.00", "18"),
        ("€18", "18"),
        ("18 dollars", "18"),
        ("18 USD", "18"),
        ("5 square meters", "5"),
        ("5cm", "5"),
        ("2x", "x+x"),
        (r"3 \text{ apples}", "3"),
        ("3/4", "0.75"),
        (r"\frac{3}{4}", "3/4"),
        (r"\dfrac{3}{4}", "0.75"),
        (r"-\frac{1}{2}", "-0.5"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-1.5"),
        ("2.50", "2.5"),
        (".5", "1/2"),
        ("240.", "240"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\frac{n^2+n}{2}", "n(n+1)/2"),
        ("(1,2)", "(1, 2)"),
        ("x=5", "5"),
        (r"\text{yes}", r"\text{yes}"),
        ("Yes", "yes"),
        ("50\\%", "50%"),
    ],
)
def test_equal_answers(answer: str, expected: str) -> None:
    assert same_answer(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("241", "240"),
        ("-5", "5"),
        ("1000", "1"),
        ("0.33", "1/3"),
        (r"2\sqrt{2}", "2"),
        ("1 1/2", "1"),
        ("(1,2)", "(2,1)"),
        ("1/0", "1"),
        ("banana", "12"),
        ("", "12"),
        (None, "12"),
        ("3 + 4i", "3"),
        ("2x", "2"),
        (r"3\pi", "3"),
        ("3 pi", "3"),
    ],
)
def test_different_answers(answer: str | None, expected: str) -> None:
    assert not same_answer(answer, expected)


@given(st.integers(-(10**12), 10**12))
def test_separators_and_currency_do_not_matter(number: int) -> None:
    assert same_answer(f"${number:,}", str(number))
    assert extract_answer(f"It is clear.\n#### {number:,}\n") == f"{number:,}"
    assert not same_answer(str(number + 1), str(number))


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_exact(over: int, under: int) -> None:
    value = as_number(f"{over}/{under}")
    assert value is not None
    assert value * under == over
    assert as_number(rf"\frac{{{over}}}{{{under}}}") == value


@given(st.text(max_size=80))
def test_any_text_is_survived(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or (answer == answer.strip() and answer)
    normalise(text)


def test_checker_stops_what_takes_too_long_and_goes_on() -> None:
    with AnswerChecker(seconds=3.0) as checker:
        assert checker.same(r"\frac{2}{4}\pi", r"\pi/2")
        start = time.monotonic()
        assert not checker.same(r"7^{7^{7^{7}}} + x", "x")
        assert time.monotonic() - start < 20
        assert checker.same("2x", "x+x")
        assert checker.same("240", "240")


def test_checker_works_in_a_thread() -> None:
    results = []

    def check() -> None:
        with AnswerChecker() as checker:
            results.append((checker.same(r"\sqrt{8}", r"2\sqrt{2}"), checker.same(r"\sqrt{8}", "3")))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert results == [(True, False)]
