"""The decoder's forward for prompts on a GPU.

Computes what `Transformer.forward` computes, with the norms, the gates and their rounding to E4M3 in one launch each:
a prompt of a few hundred tokens takes longer to launch than to compute.
"""

import torch
from torch import Tensor

from fourfold.modeling.attention import grouped_attention, mask_bias, padded_length
from fourfold.modeling.kernels import add_norm, silu_mul
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import input_scale, rounded_product
from fourfold.modeling.rope import apply_rope
from fourfold.modeling.transformer import Transformer


@torch.inference_mode()
def prefill_forward(target: Transformer, token_ids: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
    """Runs parts of prompts, each in the slot of its row, and stores their keys and values.

    Args:
        target: the model.
        token_ids, positions, cache, length: as of `Transformer.forward`.
    Returns the hidden states after the final norm, [batch, tokens, hidden].
    """
    config, (batch, tokens) = target.config, token_ids.shape
    heads = config.num_attention_heads
    seen = padded_length(length, config.head_dim, target.device)
    bias = mask_bias(positions, seen, heads // config.num_key_value_heads, target.dtype)
    rows = cache.rows(positions)
    cos, sin = target.rope(positions, cache.length)
    x, delta = target.embed(token_ids.flatten()), None
    for i, layer in enumerate(target.layers):
        normed = add_norm(x, delta, layer.input_norm.weight, layer.input_norm.eps, input_scale(layer.qkv))
        qkv = apply_rope(rounded_product(layer.qkv, normed).view(batch, tokens, -1, config.head_dim), cos, sin)
        cache.write(i, rows, qkv[:, :, heads:])
        attended = grouped_attention(qkv[:, :, :heads], *cache.read(i, seen), bias)
        # The kernels take partial sums: these are whole.
        delta = layer.o(attended.view(batch * tokens, -1))[None]
        normed = add_norm(x, delta, layer.post_norm.weight, layer.post_norm.eps, input_scale(layer.gate_up))
        gated = silu_mul(rounded_product(layer.gate_up, normed)[None], x.dtype, input_scale(layer.down))
        delta = rounded_product(layer.down, gated)[None]
    return add_norm(x, delta, target.norm.weight, target.norm.eps).view(batch, tokens, -1)
