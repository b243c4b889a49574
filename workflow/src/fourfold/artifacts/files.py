"""Small helpers for files: hashes, atomic and durable writes, full disks, JSON that reads the same every time."""

import errno
import hashlib
import json
import os
import shutil
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


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Turns an error of the block that comes from a full disk into a FourfoldError in one line.

    Args:
        path: what the block writes; need not exist.
    """
    try:
        yield
    except Exception as error:
        if not _full_disk(error):
            raise
        place = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(place).free
        raise FourfoldError(
            f"{path}: the disk is full: more than the {free / 1e6:.1f} MB that are free in {place} are needed; "
            "make room and run again"
        ) from None


def _full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Libraries written in Rust and C++ give the system's words, and no number.
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON-lines file, one row a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
