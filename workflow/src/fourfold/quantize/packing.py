"""Calibration batches without padding: several texts in one row, each attending to itself alone.

The FP8 scales are the largest activations seen. A padding token has activations too, often large ones, that no request
will ever produce; so no batch holds any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Texts in one row of n tokens."""

    input_ids: Tensor
    """int64 [1, n]."""
    position_ids: Tensor
    """int64 [1, n]; starts at 0 in each text."""
    attention_mask: Tensor | None
    """bool [1, 1, n, n]: True where the query (row) sees the key (column), earlier tokens of its own text. None for
    a single text: plain causal attention, which has a faster kernel."""
    texts: int


def packed_batches(texts: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> Iterator[PackedBatch]:
    """Packs token lists, `batch_size` at a time, in their order."""
    for start in range(0, len(texts), batch_size):
        group = texts[start : start + batch_size]
        lengths = torch.tensor([len(text) for text in group])
        owner = torch.repeat_interleave(torch.arange(len(group)), lengths)
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        mask = (owner[:, None] == owner[None, :]) & (positions[:, None] >= positions[None, :])
        placed = mask[None, None].to(device) if len(group) > 1 else None
        ids = torch.tensor([token for text in group for token in text])
        yield PackedBatch(ids[None].to(device), positions[None].to(device), placed, texts=len(group))
