"""Logging and progress: a bar on a terminal, plain lines in a log file, both from one call."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("fourfold")
_console = Console(stderr=True)
LINE_SECONDS = 10.0


def start_logging(log_file: Path | None) -> None:
    """Sends messages to standard error and, if given, to a file with times."""
    logger.setLevel(logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, mode="w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


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
