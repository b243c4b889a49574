"""The decoder's forward for prompts on a GPU.

Computes what `Transformer.forward` computes, with one launch for what lies between a product and attention or the next
product: a prompt of a few hundred tokens takes longer to launch than to compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.modeling.attention import attention_kernels, mask_bias, padded_length
from fourfold.modeling.kernels import add_norm, merge_heads, rope_write, silu_mul
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import input_scale, rounded_product
from fourfold.modeling.transformer import Transformer


@torch.inference_mode()
def prefill_forward(target: Transformer, token_ids: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
    """Runs parts of prompts, each in the slot of its row, and stores their keys and values.

    Args:
        target: the model.
        token_ids, positions, cache, length: as of `Transformer.forward`; the positions contiguous.
    Returns the hidden states after the final norm, [batch, tokens, hidden].
    """
    config, (batch, tokens) = target.config, token_ids.shape
    heads = config.num_attention_heads
    seen = padded_length(length, config.head_dim, target.device)
    bias = mask_bias(positions, seen, heads // config.num_key_value_heads, target.dtype)
    tables = target.rope_tables(cache.length)
    x, delta = target.embed(token_ids.flatten()), None
    with attention_kernels(batch * tokens * heads * seen, target.device):
        for i, layer in enumerate(target.layers):
            normed = add_norm(x, delta, layer.input_norm.weight, layer.input_norm.eps, input_scale(layer.qkv))
            # The kernels take partial sums: these are whole.
            qkv = rounded_product(layer.qkv, normed)[None]
            query = rope_write(qkv, tables, positions, cache.data[i], x.dtype, prompts=True)
            keys, values = (part.to(x.dtype) for part in cache.read(i, seen))
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
            delta = rounded_product(layer.o, merge_heads(attended, tokens, input_scale(layer.o)))[None]
            normed = add_norm(x, delta, layer.post_norm.weight, layer.post_norm.eps, input_scale(layer.gate_up))
            gated = silu_mul(rounded_product(layer.gate_up, normed)[None], x.dtype, input_scale(layer.down))
            delta = rounded_product(layer.down, gated)[None]
    return add_norm(x, delta, target.norm.weight, target.norm.eps).view(batch, tokens, -1)
