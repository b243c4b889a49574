"""Logging and progress: a bar on a terminal, plain lines in a log file, both from one call."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("fourfold")
_console = Console(stderr=True)
LINE_SECONDS = 10.0


def start_logging(log_file: Path | None) -> Callable[[], None]:
    """Sends messages to standard error and, if given, to a file with times; returns what ends the latter.

    The file also receives whatever else is printed: by libraries, by child processes, by a crash. Of several
    processes that torchrun started, the first speaks for all; the others only warn.
    """
    global _console
    rank = int(os.environ.get("RANK", "0"))
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.handlers.clear()
    logger.propagate = False
    stop: Callable[[], None] = _nothing
    screen: TextIO = sys.stderr
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            log_file.write_text("")
        file = _LogFile(log_file, mode="a", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
        screen, stop = _copy_output(log_file)
        _console = Console(file=screen)
    handler = logging.StreamHandler(screen)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    return stop


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short: the stage's own error says so, and messages still reach the screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _nothing() -> None:
    """What ends nothing."""


def _copy_output(log_file: Path) -> tuple[TextIO, Callable[[], None]]:
    """Copies standard output and error into a file as well.

    Returns a stream to the original standard error, for messages that reach the file by themselves, and what undoes
    it. `tee` does the copying: it outlives a crash of this process and so keeps its last words.
    """
    # Libraries' own bars would fill the file.
    os.environ.setdefault("TQDM_DISABLE", "1")
    originals = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    # -i: Ctrl-C reaches the whole group, and what is printed on the way out shall be kept.
    tee = subprocess.Popen(["tee", "-i", "-a", str(log_file)], stdin=subprocess.PIPE, stdout=originals[1])
    assert tee.stdin is not None
    for descriptor in (1, 2):
        os.dup2(tee.stdin.fileno(), descriptor)
    tee.stdin.close()

    def stop() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for original, descriptor in zip(originals, (1, 2), strict=True):
            os.dup2(original, descriptor)
        try:
            tee.wait(timeout=5)
        except subprocess.TimeoutExpired:
            tee.kill()  # a child that lives on holds the pipe

    return os.fdopen(os.dup(originals[1]), "w", buffering=1, encoding="utf-8", errors="replace"), stop


class Task:
    """Counts towards a total and shows how far it is."""

    def __init__(self, label: str, total: float, unit: str, bar: Progress | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._start = self._last = time.monotonic()
        self._bar = bar
        self._bar_task = bar.add_task(label, total=total) if bar else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Adds to the count; `note` (a loss, a rate) is shown beside it."""
        self.done += amount
        now = time.monotonic()
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=self.done, description=f"{self.label} {note}".rstrip())
        if now - self._last >= LINE_SECONDS or self.done >= self.total:
            self._last = now
            elapsed = now - self._start
            left = elapsed / self.done * (self.total - self.done) if self.done else float("inf")
            message = f"{self.label}: {self.done:g}/{self.total:g} {self.unit}, {elapsed:.0f} s, {left:.0f} s left"
            message = f"{message}, {note}" if note else message
            # With a bar on the screen, the line is for the log file alone.
            for handler in logger.handlers:
                if self._bar is None or isinstance(handler, logging.FileHandler):
                    handler.handle(logger.makeRecord("fourfold", logging.INFO, "", 0, message, (), None))


@contextmanager
def progress(label: str, total: float, unit: str) -> Iterator[Task]:
    """Shows the progress of a block: `with progress("train", steps, "steps") as task: task.advance()`."""
    if not _console.is_terminal:
        yield Task(label, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console) as bar:
        yield Task(label, total, unit, bar)
