"""The target model: a Llama or Qwen2 decoder for inference.

Differences between the two are in the weights alone (Qwen2 has biases on q, k and v). Query, key and value are one
product, and so are gate and up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.modeling.attention import causal_attention, grouped_attention, mask_bias, padded_length
from fourfold.modeling.beams import Beams
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import Linear, pad_rows
from fourfold.modeling.norm import RmsNorm
from fourfold.modeling.rope import apply_rope, head_tables, rope_tables


@dataclass
class Layer:
    """One decoder layer: two norms and four products."""

    input_norm: RmsNorm
    qkv: Linear
    o: Linear
    post_norm: RmsNorm
    gate_up: Linear
    down: Linear


class Transformer:
    """The decoder. Tensors are on `device`; activations are computed in `dtype`."""

    def __init__(
        self,
        config: TransformerConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: RmsNorm,
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
        """[..., hidden] after the final norm → [..., vocab], in `dtype`."""
        return self.lm_head(hidden)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, length: int, beams: Beams | None = None
    ) -> Tensor:
        """Runs new tokens, each sequence in the slot of its row, and stores their keys and values.

        Args:
            token_ids: int64 [batch, tokens].
            positions: their positions, int64 [batch, tokens]; everything before the first is in the cache.
            cache: the slots of these sequences; with beams, those of all lanes.
            length: highest position + 1 over the batch, on the host.
            beams: the paths of which the tokens are the nodes, where they do not simply follow each other.
        Returns the hidden states after the final norm, [batch, tokens, hidden].
        """
        config, (batch, tokens) = self.config, token_ids.shape
        heads = config.num_attention_heads
        seen = padded_length(length, config.head_dim, self.device)
        places = positions if beams is None else beams.places(positions)
        bias = mask_bias(places, seen, heads // config.num_key_value_heads, self.dtype)
        rows = cache.rows(places)
        cos, sin = self.rope(positions, cache.length)
        # Rows are padded once, here, and attention's result once a layer, instead of in every product.
        x = pad_rows(self.embed(token_ids.flatten()))
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.input_norm(x))[: batch * tokens]
            qkv = apply_rope(qkv.view(batch, tokens, -1, config.head_dim), cos, sin)
            if beams is None:
                cache.write(i, rows, qkv[:, :, heads:])
                attended = grouped_attention(qkv[:, :, :heads], *cache.read(i, seen), bias)
            else:
                attended = beams.attend(qkv, heads, cache, i, rows, bias)
            x = x + layer.o(pad_rows(attended.view(batch * tokens, -1)))
            x = x + self._mlp(layer, x)
        return self.norm(x)[: batch * tokens].view(batch, tokens, -1)

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor) -> Tensor:
        """Runs whole sequences without a cache.

        Args: token_ids int64 [batch, tokens], padded on the right (padding cannot reach the tokens before it).
        Returns the hidden states after the final norm, [batch, tokens, hidden]; those of padding mean nothing.
        """
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cos, sin = self.rope(torch.arange(token_ids.shape[1], device=self.device)[None], token_ids.shape[1])
        x = self.embed(token_ids)
        for layer in self.layers:
            qkv = apply_rope(layer.qkv(layer.input_norm(x)).unflatten(-1, (-1, config.head_dim)), cos, sin)
            x = x + layer.o(causal_attention(*qkv.split((heads, kv_heads, kv_heads), 2)))
            x = x + self._mlp(layer, x)
        return self.norm(x)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up))

    def rope(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tables for query, key and value heads at positions [batch, tokens]: [batch, tokens, heads, head_dim] each."""
        cos, sin = self.rope_tables(length)
        rotated = self.config.num_attention_heads + self.config.num_key_value_heads
        return head_tables(cos[positions], sin[positions], rotated, self.config.num_key_value_heads)

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions 0 … length-1 at least: float32 [length or more, head_dim] each."""
        if self._cos.shape[0] < length:
            self._cos, self._sin = rope_tables(self.config, length, self.device)
        return self._cos, self._sin
