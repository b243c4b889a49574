"""Keys and values of the running sequences: one slot a sequence, all of one length, taken once.

Running sequences always fill the first slots, so that a batch is a view of the cache and nothing is gathered. When a
sequence ends, the last one moves into its slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.modeling.config import TransformerConfig


@dataclass
class KVCache:
    """keys, values: [layers, slots, kv_heads, length, head_dim]; zero where nothing was written."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Takes the memory: layers x slots x kv_heads x length x head_dim, twice."""
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    @property
    def length(self) -> int:
        """Positions in each slot."""
        return self.keys.shape[3]

    def slots(self, start: int, stop: int) -> "KVCache":
        """A view of the slots start … stop-1."""
        return KVCache(self.keys[:, start:stop], self.values[:, start:stop])

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [batch, kv_heads, tokens, head_dim] at positions [batch, tokens] of each slot."""
        slot = torch.arange(positions.shape[0], device=positions.device)[:, None]
        # Indices around a slice put the indexed dimensions first: [batch, tokens, kv_heads, head_dim].
        self.keys[layer][slot, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][slot, :, positions] = values.transpose(1, 2).to(self.values.dtype)
