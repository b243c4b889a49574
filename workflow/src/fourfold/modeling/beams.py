"""New tokens that are the nodes of a tree: products are computed once a node, attention once a beam.

Each beam is a path from the tree's root, a plain sequence of tokens after those in the cache. So that a node's bits are
those it would have in that sequence (the order in which keys are summed matters), its beam's keys and values are put in
their places in the cache, attended to, and then replaced by the next beam's. The tree mask is this: a node sees the
cache and the nodes above it, and no other beam's.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourfold.modeling.attention import grouped_attention
from fourfold.modeling.kv_cache import KVCache


@dataclass
class Beams:
    """Where the beams of a batch of trees lie. Beams have equal lengths and begin with the root."""

    paths: Tensor
    """int64 [batch, beam_width, beam_length]: the tree's node at each step of each beam."""
    nodes: int
    """Nodes of each tree."""
    written: list[Tensor] = field(default_factory=list)
    """Keys and values of each layer, [batch, beam_width, beam_length, 2 * kv_heads, head_dim]."""

    def __post_init__(self) -> None:
        batch, width, length = self.paths.shape
        offset = torch.arange(batch, device=self.paths.device)[:, None, None] * self.nodes
        self._expand = (self.paths + offset).flatten()
        # Any beam that a node is on has its attention, to the same bits. Nodes on none take what is there.
        step = torch.arange(batch * width * length, device=self.paths.device)
        self._collapse = torch.zeros(batch * self.nodes, dtype=torch.int64, device=self.paths.device)
        self._collapse[self._expand] = step

    def places(self, positions: Tensor) -> Tensor:
        """Positions of one beam's tokens, int64 [batch, beam_length], from those of the nodes, root first."""
        return positions[:, :1] + torch.arange(self.paths.shape[2], device=positions.device)

    def attend(self, qkv: Tensor, heads: int, cache: KVCache, layer: int, rows: Tensor, bias: Tensor) -> Tensor:
        """Attention of all nodes in one layer.

        Args:
            qkv: [batch, nodes, heads + 2 * kv_heads, head_dim], RoPE applied.
            heads: query heads.
            cache: the slots of these sequences.
            rows: places of one beam's tokens, from `cache.rows`.
            bias: for one beam's tokens, from `mask_bias`; as long as the keys that are looked at.
        Returns [batch * nodes, heads * head_dim].
        """
        batch, width, length = self.paths.shape
        beams = qkv.flatten(0, 1)[self._expand].view(batch, width, length, *qkv.shape[2:])
        self.written.append(beams[:, :, :, heads:])
        attended = []
        for beam in range(width):
            cache.write(layer, rows, beams[:, beam, :, heads:])
            attended.append(grouped_attention(beams[:, beam, :, :heads], *cache.read(layer, bias.shape[-1]), bias))
        return torch.stack(attended, 1).flatten(0, 2)[self._collapse]

    def keep(self, cache: KVCache, positions: Tensor, choice: Tensor) -> None:
        """Puts the chosen beam of each sequence into the cache.

        Args: positions of the nodes, int64 [batch, nodes], as given to `Transformer.forward`; choice int64 [batch].
        """
        rows = cache.rows(self.places(positions))
        batch = torch.arange(len(choice), device=choice.device)
        for layer, keys_values in enumerate(self.written):
            cache.write(layer, rows, keys_values[batch, choice])
