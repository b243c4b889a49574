"""Rows as the sources give them, and how they are divided."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from fourfold.config.problems import Splits
from fourfold.errors import FourfoldError
from fourfold.problems.read import SPLITS, Problem, Split

# Shares of the hash range. They are fixed: a problem keeps its split however many problems the configuration asks for.
SHARES: dict[Split, float] = {"train": 0.8, "calibration": 0.1, "benchmark": 0.1}
UNSEEN_GROUPS = 0.2
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
    """The split that a problem's hash puts it into: train, calibration or benchmark."""
    bound = 0.0
    for split, share in SHARES.items():
        bound += share
        if position_of(digest) < bound:
            return split
    return "benchmark"


def is_unseen(group: str) -> bool:
    """Whether a group is one of those that are kept out of all splits but `unseen`. No group, "", is not."""
    return group != "" and position_of(hashlib.sha256(group.encode()).hexdigest()) < UNSEEN_GROUPS


def position_of(digest: str) -> float:
    """Where a hash lies in the range of hashes, in [0, 1)."""
    return int(digest[:12], 16) / 16**12


class _Pool:
    """The problems of a split whose hashes come first; holds at most twice as many as wanted: sources may be large."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.found = wanted, 0
        self._rows: dict[str, Row] = {}

    def add(self, digest: str, row: Row) -> None:
        self.found += 1
        self._rows[digest] = row
        if len(self._rows) >= 2 * self.wanted:
            self._rows = dict(self.first())

    def first(self) -> list[tuple[str, Row]]:
        return sorted(self._rows.items())[: self.wanted]


def divide(rows: Iterable[Row], splits: Splits) -> dict[Split, list[Problem]]:
    """Drops empty and repeated problems and takes the first of each split by the order of their hashes.

    Of rows with the same problem the first one counts. If unseen problems are asked for, problems of unseen groups go
    nowhere else. Raises FourfoldError when a split has fewer problems than the configuration asks for.
    """
    pools = {split: _Pool(getattr(splits, split)) for split in SPLITS}
    seen: set[str] = set()
    given = 0
    for row in rows:
        given += 1
        digest = problem_hash(row.problem)
        if digest not in seen and row.problem.strip() and row.solution.strip() and row.answer.strip():
            seen.add(digest)
            split: Split = "unseen" if splits.unseen and is_unseen(row.group) else split_of(digest)
            pools[split].add(digest, row)
    for split, pool in pools.items():
        if pool.found < pool.wanted:
            share = f"{SHARES[split]:.0%}" if split in SHARES else f"{UNSEEN_GROUPS:.0%} of the groups that rows name"
            raise FourfoldError(
                f"problems.splits.{split} asks for {pool.wanted}, but {given} rows gave {len(seen)} distinct problems "
                f"and {pool.found} of them fall into {split} (a share of {share}); ask for fewer or give more rows"
            )
    return {
        split: [
            Problem(digest[:_ID_DIGITS], row.problem, row.solution, row.answer, row.group)
            for digest, row in pool.first()
        ]
        for split, pool in pools.items()
    }
