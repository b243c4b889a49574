"""What expressions in GSM-Symbolic templates may call: draws of random values, and a few functions of numbers."""

import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Any

from fourfold.problems.expression import MAX_ITEMS, ExpressionError, number

MAX_PLACES = 12
_RATIO = re.compile(r"(\d{1,15})/([1-9]\d{0,14})")
_DECIMAL = re.compile(r"-?\d{1,15}(\.\d{1,15})?")


class Ratio(Fraction):
    """A number that is written as `a/b`, where a plain Fraction is written as a decimal. Arithmetic gives Fractions."""


def parse_value(value: Any) -> Any:
    """A drawn value as templates compute with it: "3/4" and "0.25" are numbers, other text stays text."""
    if not isinstance(value, str):
        return value
    if match := _RATIO.fullmatch(value):
        return Ratio(int(match[1]), int(match[2]))
    if _DECIMAL.fullmatch(value):
        return whole(Fraction(value))
    return value


def whole(value: Fraction | int) -> Fraction | int:
    """The value, as an int if it is whole."""
    return value.numerator if value.denominator == 1 else value


def write_value(value: Any) -> str:
    """A value as it stands in a text: whole numbers plain, decimals where they end, else a ratio."""
    if isinstance(value, bool) or not isinstance(value, int | Fraction):
        return str(value)
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if isinstance(value, Ratio) or rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = next(n for n in range(1, 64) if (value * 10**n).denominator == 1)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _integer(value: Any) -> int:
    value = number(value)
    if value.denominator != 1:
        raise ExpressionError(f"{value} is not whole")
    return value.numerator


def _round(value: Any, places: int = 0) -> int | Fraction:
    # Half away from zero, as people round; Python rounds half to even.
    digits = _integer(places)
    if not 0 <= digits <= MAX_PLACES:
        raise ExpressionError(f"rounding to {digits} places")
    scale = 10**digits
    value = number(value) * scale
    rounded = math.floor(abs(value) + Fraction(1, 2))
    return whole(Fraction(rounded if value >= 0 else -rounded, scale))


def _ratio(value: Any) -> Ratio:
    value = number(value)
    return Ratio(value.numerator, value.denominator)


def _plural(count: Any, one: str, other: str) -> str:
    return one if abs(number(count)) == 1 else other


NUMBER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "is_int": lambda value: number(value).denominator == 1,
    "divides": lambda value, divisor: number(divisor) != 0 and number(value) % number(divisor) == 0,
    "int": lambda value: int(number(value)),
    "float": lambda value: whole(Fraction(number(value))),
    "round": _round,
    "ensure_int": _integer,
    "Fraction": _ratio,
    "plural": _plural,
}


def _items(values: Any) -> list[Any]:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_ITEMS:
        raise ExpressionError("expected a list with items")
    return values


@functools.lru_cache(maxsize=256)
def _range(start: Any, end: Any, step: Any = 1) -> range:
    values = range(_integer(start), _integer(end), _integer(step))
    if not 0 < len(values) <= MAX_ITEMS:
        raise ExpressionError(f"range of {len(values)} numbers")
    return values


def drawing_functions(rng: Random) -> dict[str, Callable[..., Any]]:
    """The functions of `#init:` lines, which draw from a random generator, and the functions of numbers."""

    def sample(values: Any, count: Any = 1) -> Any:
        return rng.choice(_items(values)) if count == 1 else rng.sample(_items(values), _integer(count))

    def sample_sequential(values: Any, count: Any) -> list[Any]:
        start = rng.randrange(len(_items(values)))
        return [values[(start + i) % len(values)] for i in range(min(_integer(count), MAX_ITEMS))]

    def draw_range(*bounds: Any) -> int:
        values = _range(*bounds)
        return values.start + values.step * rng.randrange(len(values))

    def range_str(start: Any, end: Any, step: Any, words: Any) -> list[Any]:
        value = draw_range(start, end, step)
        return [_items(words)[value - 1], value]

    def arange(start: Any, end: Any, step: Any) -> int | Fraction:
        start, step = number(start), number(step)
        count = math.floor((number(end) - start) / step) + 1 if step > 0 else 0
        if not 0 < count <= MAX_ITEMS:
            raise ExpressionError(f"arange of {count} numbers")
        return whole(Fraction(start + rng.randrange(count) * step))

    return {
        **NUMBER_FUNCTIONS,
        "sample": sample,
        "sample_sequential": sample_sequential,
        "range": draw_range,
        "range_list": lambda *bounds: list(_range(*bounds)),
        "range_str": range_str,
        "arange": arange,
    }
