"""Rows as the sources give them, and how they are divided."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from fourfold.config.problems import Splits
from fourfold.errors import FourfoldError
from fourfold.problems.read import SPLITS, Problem, Split

# Shares of the hash range. They are fixed: a problem keeps its split whatever the configuration asks for.
SHARES: dict[Split, float] = {"train": 0.8, "calibration": 0.1, "benchmark": 0.1}
_ID_DIGITS = 16


@dataclass(frozen=True)
class Row:
    """A problem as a source gives it."""

    problem: str
    solution: str
    answer: str
    group: str = ""


def problem_hash(problem: str) -> str:
    """SHA-256 of a problem's text; white space does not count."""
    return hashlib.sha256(" ".join(problem.split()).encode()).hexdigest()


def split_of(digest: str) -> Split:
    """The split that a problem's hash puts it into."""
    position = int(digest[:12], 16) / 16**12
    bound = 0.0
    for split in SPLITS[:-1]:
        bound += SHARES[split]
        if position < bound:
            return split
    return SPLITS[-1]


def divide(rows: Iterable[Row], splits: Splits) -> dict[Split, list[Problem]]:
    """Drops empty and repeated problems and takes the first of each split by the order of their hashes.

    Raises FourfoldError when a split has fewer problems than the configuration asks for.
    """
    found: dict[str, Row] = {}
    given = 0
    for row in rows:
        given += 1
        if row.problem.strip() and row.solution.strip() and row.answer.strip():
            found.setdefault(problem_hash(row.problem), row)
    pools: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
    for digest, row in sorted(found.items()):
        pools[split_of(digest)].append(Problem(digest[:_ID_DIGITS], row.problem, row.solution, row.answer, row.group))
    wanted: dict[Split, int] = splits.model_dump()  # type: ignore[assignment]
    for split, count in wanted.items():
        if len(pools[split]) < count:
            raise FourfoldError(
                f"problems.splits.{split} asks for {count}, but {given} rows gave {len(found)} distinct problems and "
                f"{len(pools[split])} of them fall into {split} (a share of {SHARES[split]:.0%}); "
                "ask for fewer or give more rows"
            )
    return {split: pools[split][: wanted[split]] for split in SPLITS}
