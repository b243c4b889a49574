"""Reads the problems that fetch_problems wrote."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import numbered_rows
from fourfold.errors import FourfoldError

Split = Literal["train", "calibration", "benchmark", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Problem:
    """A problem with a worked solution and its final answer."""

    id: str
    """Short hash of the problem's text."""
    problem: str
    solution: str
    answer: str
    group: str
    """Template or category that it belongs to; empty if the source knows none."""


def read_problems(manifest: Path, split: Split) -> list[Problem]:
    """Problems of a split, in the order of their hash: the first N are the same whatever else is asked for.

    Raises FourfoldError when the artifact is cut, changed, or holds no such split.
    """
    if split not in SPLITS:
        raise FourfoldError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    read_manifest(manifest, "fetch_problems")
    path = manifest.parent / f"{split}.jsonl"
    names = {field.name for field in fields(Problem)}
    problems: dict[str, Problem] = {}
    for number, row in numbered_rows(path):
        if row.keys() != names or row["id"] in problems:
            found = "an id that an earlier line has" if row.keys() == names else f"the keys {', '.join(row)}"
            raise FourfoldError(f"{path}, line {number}: {found}; delete {manifest.parent} and run again")
        problems[row["id"]] = Problem(**row)
    return list(problems.values())
