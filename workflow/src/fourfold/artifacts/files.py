"""Small helpers for files: hashes, atomic writes, JSON that reads the same every time."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
