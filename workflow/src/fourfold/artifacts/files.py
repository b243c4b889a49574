"""Small helpers for files: hashes, atomic and durable writes, JSON that reads the same every time."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fourfold.errors import FourfoldError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def partial_path(path: Path) -> Path:
    """Where a file is written before it is moved into its place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


def sync_tree(directory: Path) -> None:
    """Returns when a directory with all that it holds is on disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Returns when a directory's entries are on disk, as far as its file system can tell."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems refuse; there, a directory is as durable as they make it.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and row of each line of a JSON-lines file that is not blank.

    A byte order mark is skipped. Raises FourfoldError naming the line that is not UTF-8 or no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError:
                raise FourfoldError(f"{path}, line {number}: not UTF-8; save the file in that encoding") from None
            except json.JSONDecodeError as error:
                what = f"{error.msg}, column {error.colno}"
                raise FourfoldError(f"{path}, line {number}: not JSON ({what}); correct the line") from None
            except (ValueError, RecursionError) as error:
                raise FourfoldError(f"{path}, line {number}: cannot be read ({error}); correct the line") from None
            if text.strip() and not isinstance(row, dict):
                raise FourfoldError(f"{path}, line {number}: a {type(row).__name__}; a JSON object is expected")
            if row is not None:
                yield number, row


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. Raises FourfoldError as `numbered_rows` does."""
    return [row for _, row in numbered_rows(path)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON-lines file, one row a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
