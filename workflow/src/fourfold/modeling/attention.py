"""Grouped-query attention over the KV cache, for any number of query tokens a sequence.

The query heads that share a key/value head become rows of one product, so keys and values are read once and never
repeated. Below MIN_ROWS rows a CPU's matrix product chooses other instructions and rounds differently; padding to
MIN_ROWS makes a token's attention the same to the last bit, whether it is computed alone, in a verification of several
tokens, or in a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 8
KEY_BLOCK = 64


def mask_bias(positions: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a query may look, -inf where it may not.

    Args:
        positions: position of each query token, int64 [batch, tokens].
        length: keys that are looked at.
        group: query heads per key/value head.
        dtype: dtype of the queries.
    Returns [batch, 1, rows, length], rows = tokens x group padded to MIN_ROWS on a CPU; padding rows see everything.
    """
    hidden = torch.arange(length, device=positions.device) > positions[:, :, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
    bias = bias.repeat_interleave(group, dim=1)
    return _pad_rows(bias, dim=1)[:, None]


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of new tokens to the cached ones.

    Args:
        query: [batch, tokens, heads, head_dim].
        keys, values: [batch, kv_heads, length, head_dim].
        bias: from `mask_bias`.
    Returns [batch, tokens, heads * head_dim].
    """
    batch, tokens, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    # [batch, kv_heads, tokens * group, dim]: row t * group + g is query head g of token t.
    rows = query.view(batch, tokens, kv_heads, group, dim).transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(_pad_rows(rows, dim=2), keys, values, attn_mask=bias)
    out = out[:, :, : tokens * group].view(batch, kv_heads, tokens, group, dim)
    return out.transpose(1, 2).reshape(batch, tokens, heads * dim)


def _pad_rows(x: Tensor, dim: int) -> Tensor:
    missing = MIN_ROWS - x.shape[dim]
    if x.device.type != "cpu" or missing <= 0:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention within whole sequences, without a cache.

    Args: query [batch, tokens, heads, head_dim]; keys, values [batch, tokens, kv_heads, head_dim].
    Returns [batch, tokens, heads * head_dim].
    """
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)
