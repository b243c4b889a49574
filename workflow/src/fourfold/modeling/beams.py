"""New tokens that are the nodes of a tree: products are computed once a node, attention once a beam.

Each beam is a path from the tree's root, a plain sequence of tokens after those in the cache, and has a slot of the
cache to itself: its lane. Beam 0's is the sequence's own slot; the lanes of a batch of n sequences are the slots
n … 2n-1 for beam 1, and so on. So a node sees the cache and the nodes above it and no other beam's, which is the tree
mask, and its bits are those it would have in a plain sequence, which a mask over one cache would not give: the order
in which keys are summed matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.modeling.attention import grouped_attention
from fourfold.modeling.kv_cache import KVCache


@dataclass
class Beams:
    """Where the beams of a batch of trees lie. Beams have equal lengths and begin with the root."""

    paths: Tensor
    """int64 [batch, beam_width, beam_length]: the tree's node at each step of each beam; the root after its end."""
    nodes: int
    """Nodes of each tree."""

    def __post_init__(self) -> None:
        batch = self.paths.shape[0]
        offset = torch.arange(batch, device=self.paths.device)[:, None, None] * self.nodes
        # Lane after lane: all sequences' first beams, then their second ones …
        self._expand = (self.paths + offset).transpose(0, 1).flatten()
        # Any beam that a node is on has its attention, to the same bits; the first is taken, since the root may fill up
        # the end of a short beam. Nodes on none take what is there.
        step = torch.arange(self._expand.numel(), device=self.paths.device)
        first = step.new_zeros(batch * self.nodes)
        self._collapse = first.scatter_reduce(0, self._expand, step, "amin", include_self=False)

    @property
    def width(self) -> int:
        """Beams of each tree."""
        return self.paths.shape[1]

    def places(self, positions: Tensor) -> Tensor:
        """Positions of the lanes' tokens, int64 [beam_width * batch, beam_length], from those of the nodes."""
        steps = torch.arange(self.paths.shape[2], device=positions.device)
        return (positions[:, :1] + steps).repeat(self.width, 1)

    def attend(self, qkv: Tensor, heads: int, cache: KVCache, layer: int, rows: Tensor, bias: Tensor) -> Tensor:
        """Attention of all nodes in one layer.

        Args:
            qkv: [batch, nodes, heads + 2 * kv_heads, head_dim], RoPE applied.
            heads: query heads.
            cache: the slots of all lanes.
            rows: places of the lanes' tokens, from `cache.rows`.
            bias: for the lanes' tokens, from `mask_bias`; as long as the keys that are looked at.
        Returns [batch * nodes, heads * head_dim].
        """
        batch, width, length = self.paths.shape
        lanes = qkv.flatten(0, 1).index_select(0, self._expand).view(width * batch, length, *qkv.shape[2:])
        cache.write(layer, rows, lanes[:, :, heads:])
        attended = grouped_attention(lanes[:, :, :heads], *cache.read(layer, bias.shape[-1]), bias)
        return attended.flatten(0, 1).index_select(0, self._collapse)


def open_lanes(cache: KVCache, sequences: int, have: int, want: int, length: int) -> None:
    """Copies the first `length` positions of the sequences' own slots into their lanes have … want-1."""
    for lane in range(have, want):
        cache.raw[:, lane * sequences : (lane + 1) * sequences, :, :length] = cache.raw[:, :sequences, :, :length]


def keep_beam(cache: KVCache, lanes: int, start: Tensor, length: int, choice: Tensor) -> None:
    """Puts the newest tokens of the chosen beam of each sequence into all of its lanes.

    Args: the slots of all lanes, and how many lanes there are; position of the root, int64 [batch]; tokens of a beam;
        the beam of each sequence, int64 [batch].
    """
    batch = len(choice)
    slot = torch.arange(batch, device=choice.device)
    places = start[:, None] + torch.arange(length, device=choice.device)
    newest = cache.raw[:, (choice * batch + slot)[:, None], :, places]
    for lane in range(lanes):
        cache.raw[:, (lane * batch + slot)[:, None], :, places] = newest
