"""Keys and values of the running sequences: one slot a sequence, all of one length, taken once.

Running sequences always fill the first slots, so that a batch is a view of the cache and nothing is gathered. When a
sequence ends, the last one moves into its slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.modeling.attention import padded_length
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.linear import E4M3_MAX


@dataclass
class KVCache:
    """data: [layers, slots, 2 * kv_heads, length, head_dim], key heads then value heads; zero until written.

    In the model's dtype, or in E4M3 at half the bytes or less: values beyond its range become its largest.
    """

    data: Tensor

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Takes the memory: layers x slots x 2 kv_heads x `padded_length(length)` x head_dim."""
        length = padded_length(length, config.head_dim, device)
        shape = (config.num_hidden_layers, slots, 2 * config.num_key_value_heads, length, config.head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype))

    @property
    def raw(self) -> Tensor:
        """`data` as numbers that every operation can copy: bytes, for E4M3."""
        return self.data.view(torch.uint8) if self.data.dtype == torch.float8_e4m3fn else self.data

    @property
    def length(self) -> int:
        """Positions in each slot."""
        return self.data.shape[3]

    @property
    def num_slots(self) -> int:
        """Slots."""
        return self.data.shape[1]

    def slots(self, start: int, stop: int) -> "KVCache":
        """A view of the slots start … stop-1."""
        return KVCache(self.data[:, start:stop])

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        self.slots(target, target + 1).copy(self.slots(source, source + 1), length)

    def copy(self, other: "KVCache", length: int) -> None:
        """Takes the first `length` positions from another cache of as many slots, in the same dtype."""
        # A GPU copies number by number: the wider they are, the sooner it is done.
        wide = self.data.shape[-1] * self.data.element_size() % 8 == 0
        ours, theirs = (cache.data.view(torch.int64) if wide else cache.raw for cache in (self, other))
        ours[:, :, :, :length] = theirs[:, :, :, :length]

    def rows(self, positions: Tensor) -> Tensor:
        """Where new tokens go, for `write`.

        Args: positions int64 [batch, tokens], in each slot. Returns int64 [batch * tokens * 2 * kv_heads].
        """
        batch, heads = positions.shape[0], self.data.shape[2]
        head = torch.arange(batch * heads, device=positions.device).view(batch, 1, heads)
        return (head * self.length + positions[:, :, None]).flatten()

    def write(self, layer: int, rows: Tensor, keys_values: Tensor) -> None:
        """Stores the keys and values of new tokens, [batch, tokens, 2 * kv_heads, head_dim], in one layer."""
        values = keys_values.reshape(-1, self.data.shape[-1])
        if self.data.dtype == torch.float8_e4m3fn:
            values = values.clamp(-E4M3_MAX, E4M3_MAX).to(self.data.dtype).view(torch.uint8)
        raw = self.raw[layer]
        raw.view(-1, raw.shape[-1]).index_copy_(0, rows, values.to(raw.dtype))

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first positions: views [batch, kv_heads, length, head_dim], in the cache's dtype."""
        keys, values = self.data[layer, :, :, :length].chunk(2, dim=1)
        return keys, values
