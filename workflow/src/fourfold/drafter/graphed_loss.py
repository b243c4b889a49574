"""The drafter's loss on a GPU as CUDA graphs: one launch a batch, where launching its kernels one by one takes longer.

A graph is captured for each number of rows (`Batch.padded` keeps them few), with gradients and without. It reads a
batch from buffers of its own, adds gradients to those that the parameters have, and leaves counts in a buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.drafter.loss import DraftLoss
from fourfold.drafter.metrics import DraftCounts
from fourfold.drafter.states import Batch
from fourfold.modeling.captures import Captures


@dataclass(frozen=True)
class CapturedLoss:
    """The loss of so many rows: what it reads, how it is computed, and where the counts are then."""

    batch: Batch
    weight: Tensor | None
    replay: Callable[[], None]
    counts: DraftCounts

    def run(self, batch: Batch, weight: Tensor | None) -> DraftCounts:
        """As `DraftLoss`; the counts stay as they are until any loss is replayed."""
        for name in ("hidden", "tokens", "remaining"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        if self.weight is not None and weight is not None:
            self.weight.copy_(weight)
        self.replay()
        return self.counts


class GraphedLoss:
    """A DraftLoss that is captured when a number of rows comes first, and replayed from then on.

    All parameters of the drafter must have a gradient and keep that tensor: it is zeroed in place, not dropped.
    Autocast must not cache weights (`cache_enabled=False`): what a graph has cast is in that graph's memory.
    """

    def __init__(self, loss: DraftLoss) -> None:
        self.loss = loss
        self._captured: dict[tuple[int, bool], CapturedLoss] = {}
        self._captures = Captures()

    def __call__(self, batch: Batch, weight: Tensor | None = None) -> DraftCounts:
        """As `DraftLoss`; the counts stay as they are until the next call."""
        key = (len(batch.tokens), weight is not None)
        if key not in self._captured:
            self._captured[key] = self._prepare(batch, weight)
        return self._captured[key].run(batch, weight)

    def _prepare(self, like: Batch, weight: Tensor | None) -> CapturedLoss:
        # Buffers of zeros: no row starts a draft, and a weight of 0 adds nothing to the gradients when the loss runs
        # before it is captured.
        batch = Batch(torch.zeros_like(like.hidden), torch.zeros_like(like.tokens), torch.zeros_like(like.remaining))
        own = None if weight is None else torch.zeros_like(weight)
        return CapturedLoss(batch, own, *self._capture(lambda: self.loss(batch, own)))

    def _capture(self, compute: Callable[[], DraftCounts]) -> tuple[Callable[[], None], DraftCounts]:
        return self._captures.capture(compute)
