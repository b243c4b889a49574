"""A journal of finished rows: what a killed run does not have to do again."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Self

SYNC_SECONDS = 1.0
"""Seconds between flushes to disk: a disk may take longer for one than a GPU for a row."""


def work_key(settings: str, inputs: dict[str, str]) -> str:
    """Sixteen hexadecimal digits that stand for a stage's settings and the hashes of its inputs."""
    text = json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Rows with an `id`, appended one JSON line at a time: a kill tears at most the last, a power cut loses a second's.

    The key is part of the file's name: a journal of other settings or inputs is never read.
    """

    def __init__(self, work: Path, name: str, key: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.path = work / f"{name}-{key}.jsonl"
        self.rows = self._read()
        self._file = self.path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Rows by id. A torn last line is cut off the file, so that the next row starts a line of its own."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        rows: dict[str, dict[str, Any]] = {}
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            if not line.endswith(b"\n") or not isinstance(row, dict) or "id" not in row:
                break
            rows[row["id"]] = row
            whole += len(line)
        if whole < len(content):
            os.truncate(self.path, whole)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; the operating system has it when this returns, the disk a second later."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self.rows[row["id"]] = row

    def close(self) -> None:
        """Closes the file and keeps it."""
        self._file.close()

    def remove(self) -> None:
        """Closes and deletes the file: its rows have been written elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
