"""What a killed training resumes from: one file, written whole, and the wish to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fourfold.artifacts.files import atomic_file, partial_path
from fourfold.drafter.metrics import DraftCounts
from fourfold.errors import FourfoldError
from fourfold.modeling.redrafter import Redrafter


@dataclass
class TrainingState:
    """Weights, optimiser and everything that decides what comes next.

    Nothing random is left after the start: the order of the data is a function of seed and epoch, so step and epoch are
    all that there is to remember of it.
    """

    drafter: Redrafter
    optimizer: torch.optim.Optimizer
    counts: DraftCounts
    """Of the steps since the last row, over all processes."""
    step: int = 0
    """Optimiser steps done."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of training.csv so far."""
    best_epoch: int = 0
    """Epoch (from 1) with the longest simulated acceptance length on the held-out texts; 0 before any."""
    best_length: float = 0.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Its weights, on the CPU."""

    def save(self, path: Path) -> None:
        """Writes the state, so that it is there whole or not at all."""
        content = {
            "drafter": self.drafter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts.pack(),
            "step": self.step,
            "rows": self.rows,
            "best_epoch": self.best_epoch,
            "best_length": self.best_length,
            "best_weights": self.best_weights,
        }
        with atomic_file(path) as file:
            torch.save(content, file)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote, in place. Raises FourfoldError when the file is broken."""
        device = next(self.drafter.parameters()).device
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.drafter.load_state_dict(content["drafter"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.counts = DraftCounts.unpack(content["counts"].to(device), len(self.counts.loss))
        except Exception as error:  # torch.load raises whatever the broken bytes lead to
            reason = " ".join(str(error).split())[:200]
            raise FourfoldError(f"{path}: cannot be read ({reason}); delete it to train from the start") from None
        for name in ("step", "rows", "best_epoch", "best_length", "best_weights"):
            setattr(self, name, content[name])

    @staticmethod
    def discard(path: Path) -> None:
        """Deletes what `save` wrote, and what a kill left of it."""
        for file in (path, partial_path(path)):
            file.unlink(missing_ok=True)

    def note_best(self, epoch: int, length: float) -> None:
        """Keeps the weights if they are the best so far."""
        if self.best_epoch == 0 or length > self.best_length:
            self.best_epoch, self.best_length = epoch, length
            self.best_weights = {name: value.cpu().clone() for name, value in self.drafter.state_dict().items()}


class StopRequest:
    """The signal that asked the training to stop, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = number


@contextmanager
def catch_stop() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request, so that the training can save before it ends."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
