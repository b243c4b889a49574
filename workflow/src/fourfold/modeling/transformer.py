"""The target model: a Llama or Qwen2 decoder for inference.

Differences between the two are in the weights alone (Qwen2 has biases on q, k and v). Query, key and value are one
product, and so are gate and up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.modeling.attention import KEY_BLOCK, causal_attention, grouped_attention, mask_bias
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import Linear
from fourfold.modeling.rope import apply_rope, rope_tables


@dataclass
class Layer:
    """One decoder layer: two norms (weights [hidden]) and four products."""

    input_norm: Tensor
    qkv: Linear
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Transformer:
    """The decoder. Tensors are on `device`; activations are computed in `dtype`."""

    def __init__(
        self,
        config: TransformerConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        lm_head: Linear,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.embedding, self.layers, self.norm, self.lm_head = embedding, layers, norm, lm_head
        self._cos, self._sin = rope_tables(config, 0, device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings: int64 [...] → [..., hidden]."""
        return F.embedding(token_ids, self.embedding).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] after the final norm → float32 [..., vocab]."""
        return self.lm_head(hidden).float()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """Runs new tokens, each sequence in the slot of its row, and stores their keys and values.

        Args:
            token_ids: int64 [batch, tokens].
            positions: their positions, int64 [batch, tokens]; everything before them is in the cache.
            cache: the slots of these sequences.
            length: highest position + 1 over the batch, on the host.
        Returns the hidden states after the final norm, [batch, tokens, hidden].
        """
        config = self.config
        # A few lengths instead of all: views of stable sizes.
        seen = min(-(-length // KEY_BLOCK) * KEY_BLOCK, cache.length)
        bias = mask_bias(positions, seen, config.num_attention_heads // config.num_key_value_heads, self.dtype)
        cos, sin = self._rope(positions, cache.length)
        x = self.embed(token_ids)
        for i, layer in enumerate(self.layers):
            query, key, value = self._qkv(layer, x, cos, sin)
            cache.write(i, positions, key.transpose(1, 2), value.transpose(1, 2))
            x = x + layer.o(grouped_attention(query, cache.keys[i, :, :, :seen], cache.values[i, :, :, :seen], bias))
            x = x + self._mlp(layer, x)
        return self._norm(x, self.norm)

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor) -> Tensor:
        """Runs whole sequences without a cache.

        Args: token_ids int64 [batch, tokens], padded on the right (padding cannot reach the tokens before it).
        Returns the hidden states after the final norm, [batch, tokens, hidden]; those of padding mean nothing.
        """
        positions = torch.arange(token_ids.shape[1], device=self.device)[None]
        cos, sin = self._rope(positions, token_ids.shape[1])
        x = self.embed(token_ids)
        for layer in self.layers:
            x = x + layer.o(causal_attention(*self._qkv(layer, x, cos, sin)))
            x = x + self._mlp(layer, x)
        return self._norm(x, self.norm)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, tokens, hidden] → rotated query, rotated key, value: [batch, tokens, heads, head_dim]."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = layer.qkv(self._norm(x, layer.input_norm)).unflatten(-1, (-1, config.head_dim))
        rotated = apply_rope(qkv[:, :, : heads + kv_heads], cos, sin)
        return rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, heads + kv_heads :]

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, -1)
        return layer.down(F.silu(gate) * up)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm in float32, over the last dimension."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self.config.rms_norm_eps))
        return (wide * scale).to(self.dtype) * weight

    def _rope(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tables for positions [batch, tokens]: [batch, tokens, 1, head_dim] each."""
        if self._cos.shape[0] < length:
            self._cos, self._sin = rope_tables(self.config, length, self.device)
        return self._cos[positions][:, :, None], self._sin[positions][:, :, None]
