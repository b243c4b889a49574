"""Runs the command line in this process and checks how it refuses: one line, exit code 1, and nothing lost."""

import contextlib
import io
import re
import sys
from pathlib import Path
from unittest import mock

from fourfold import cli


def fourfold(*arguments: object) -> tuple[int, str]:
    """Runs a command; its exit code, and what it wrote to standard error."""
    code: object = 0
    stream = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fourfold", *map(str, arguments)]),
        contextlib.redirect_stderr(stream),
        contextlib.suppress(KeyboardInterrupt),
    ):
        try:
            cli.run()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int | None)
    return code or 0, stream.getvalue()


def old_artifact(folder: Path) -> Path:
    """An earlier artifact at the place of a new one; returns its manifest."""
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("made earlier")
    (folder / "manifest.json").write_text('{"files": {}}')
    return folder / "manifest.json"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder, hidden files too; of files the time of their change and their content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in sorted(folder.rglob("*"))
    }


def check_refusal(kept: Path, message: str, *arguments: object) -> None:
    """Runs a command that must be refused: the last line alone is an error that `message` (a pattern) is found in.

    What is below `kept` must be the same afterwards: earlier artifacts untouched, no partial files.
    """
    before = snapshot(kept)
    code, text = fourfold(*arguments)
    assert code == 1, text
    assert "Traceback" not in text
    *earlier, last = text.splitlines()
    assert last.startswith("error: "), text
    assert not [line for line in earlier if line.startswith("error: ")], text
    assert re.search(message, last), last
    # The folder in which an artifact is prepared is gone when the message is read.
    assert ".partial" not in last
    assert snapshot(kept) == before
