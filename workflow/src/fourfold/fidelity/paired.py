"""Paired accuracy: two engines' answers to the same requests, and what their difference can be.

Problems differ in difficulty far more than engines in skill, so answers are compared request by request (same problem,
same place in the workload, same seed), and the requests of one problem count as one cluster (Miller, arXiv 2411.00640,
sections 2.2 and 4).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

CONFIDENCE = 0.95
Row = Mapping[str, Any]


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one engine less that of another, -1 to 1, with its 95 % interval."""

    difference: float
    low: float
    high: float
    problems: int
    pairs: int
    gained: int
    """Pairs in which this engine alone is right."""
    lost: int
    """Pairs in which the other alone is right."""


def paired_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> PairedDifference | None:
    """Compares the requests that both engines finished; rows are those of requests.jsonl. None without any.

    A problem's difference d is the mean over its pairs, and all problems weigh alike. The interval is that of Agresti
    and Min (Statistics in Medicine 24, 2005, 729-740): Wald's after one more problem that is gained by half and lost by
    half, and one without a difference, so that few problems, or none on which the engines differ, give a wide interval
    instead of none:

        (sum d ± t * sqrt((n + 2) * V)) / (n + 2),   V = (sum d^2 + 1) / (n + 2) - (sum d / (n + 2))^2

    For one pair a problem this is their formula; t is Student's with n - 1 degrees of freedom instead of the normal
    quantile, whose intervals are too short below some 20 problems (for three, they cover as little as 75 %). A single
    problem tells nothing about others: its interval is -1 to 1.
    """
    before = {_key(row): row["correct"] for row in theirs if row["correct"] is not None}
    differences: dict[str, list[int]] = {}
    for row in ours:
        if row["correct"] is not None and _key(row) in before:
            differences.setdefault(row["problem_id"], []).append(int(row["correct"]) - int(before[_key(row)]))
    if not differences:
        return None
    means = [sum(values) / len(values) for values in differences.values()]
    flat = [value for values in differences.values() for value in values]
    low, high = interval(means)
    return PairedDifference(
        difference=math.fsum(means) / len(means),
        low=low,
        high=high,
        problems=len(means),
        pairs=len(flat),
        gained=flat.count(1),
        lost=flat.count(-1),
    )


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of differences in -1 to 1: see `paired_difference`."""
    count = len(differences)
    if count < 2:
        return -1.0, 1.0
    adjusted = count + 2
    mean = math.fsum(differences) / adjusted
    variance = (math.fsum(d * d for d in differences) + 1) / adjusted - mean * mean
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / adjusted)
    return max(-1.0, mean - half), min(1.0, mean + half)


def same_text(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[int, int]:
    """How many of the requests that both engines finished have the same text, and how many there are."""
    texts = {_key(row): row["text"] for row in theirs if row["correct"] is not None}
    pairs = [(row["text"], texts[_key(row)]) for row in ours if row["correct"] is not None and _key(row) in texts]
    return sum(one == other for one, other in pairs), len(pairs)


def _key(row: Row) -> tuple[Any, ...]:
    """A request's place in the benchmark; the same for all engines of one configuration."""
    load = row["concurrency"], row.get("request_rate")
    return *load, row["repeat"], row["workload"], row["index"], row["problem_id"]
