"""Grouped-query attention over the KV cache, for any number of query tokens a sequence.

The query heads that share a key/value head become rows of one product, so keys and values are read once and never
repeated. On a CPU a token's attention has the same bits whether it is computed alone, in a verification of several
tokens, in a batch, or in a prompt that is cut anywhere. Two things see to that: below MIN_ROWS rows a matrix product
chooses other instructions and rounds differently, so rows are padded until no part of them is that small; and a product
over many keys is summed in parts whose borders depend on their number, so only those numbers are used that add up alike
(`key_lengths`).
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MIN_ROWS = 8
KEY_BLOCK = 64
ROW_SPLIT = 32
"""PyTorch's attention on a CPU goes through the rows in parts of this many, or of a multiple of it."""
PLANNED_SCORES = 2**27
"""Scores from which on cuDNN, PyTorch's first choice on Hopper, may compute them. It takes half the time, but plans
each new shape for some 45 ms, and prompts have all lengths. From here on it saves half a millisecond a layer."""
SPLIT = 512
"""PyTorch's attention on a CPU goes through the keys in parts of this many."""


@functools.cache
def key_lengths(head_dim: int) -> tuple[int, ...]:
    """Numbers of keys, up to SPLIT, that give the same bits when all beyond some key are masked.

    Which ones do depends on how the processor's matrix product parts its sums, so it is measured, once. Beyond SPLIT
    the same numbers hold for the remainder.
    """
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, head_dim, generator=generator) for n in (32, SPLIT, SPLIT))
    stable = []
    for length in range(KEY_BLOCK, SPLIT, KEY_BLOCK):
        for rows in (MIN_ROWS, 12, 32):
            bias = torch.zeros(1, 1, rows, SPLIT)
            bias[..., length - KEY_BLOCK // 2 :] = float("-inf")
            few = (query[:, :, :rows], keys[:, :, :length], values[:, :, :length], bias[..., :length].contiguous())
            all_keys = F.scaled_dot_product_attention(query[:, :, :rows], keys, values, attn_mask=bias)
            if not torch.equal(F.scaled_dot_product_attention(*few[:3], attn_mask=few[3]), all_keys):
                break
        else:
            stable.append(length)
    return (*stable, SPLIT)


def padded_length(length: int, head_dim: int, device: torch.device) -> int:
    """The number of keys to look at so that `length` of them are among them."""
    if device.type != "cpu":
        return -(-length // KEY_BLOCK) * KEY_BLOCK
    whole, rest = divmod(length, SPLIT)
    return whole * SPLIT + (next(n for n in key_lengths(head_dim) if n >= rest) if rest else 0)


def mask_bias(positions: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a query may look, -inf where it may not.

    Args:
        positions: position of each query token, int64 [batch, tokens].
        length: keys that are looked at.
        group: query heads per key/value head.
        dtype: dtype of the queries.
    Returns [batch, 1, rows, length], rows = tokens x group, padded on a CPU; padding rows see everything.
    """
    hidden = torch.arange(length, device=positions.device) > positions[:, :, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
    bias = bias.repeat_interleave(group, dim=1)
    return _pad_rows(bias, dim=1)[:, None]


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of new tokens to the cached ones.

    Args:
        query: [batch, tokens, heads, head_dim].
        keys, values: [batch, kv_heads, length, head_dim], in the query's dtype or E4M3.
        bias: from `mask_bias`.
    Returns [batch, tokens, heads * head_dim].
    """
    batch, tokens, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    # [batch, kv_heads, tokens * group, dim]: row t * group + g is query head g of token t.
    rows = query.view(batch, tokens, kv_heads, group, dim).transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    out = _attend(_pad_rows(rows, dim=2), keys, values, attn_mask=bias)
    out = out[:, :, : tokens * group].view(batch, kv_heads, tokens, group, dim)
    return out.transpose(1, 2).reshape(batch, tokens, heads * dim)


def attention_kernels(scores: int, device: torch.device) -> AbstractContextManager[object]:
    """In which PyTorch's attention computes so many scores by what takes any shape as it comes.

    On a GPU, where there is little to compute; elsewhere PyTorch chooses.
    """
    if device.type == "cpu" or scores >= PLANNED_SCORES:
        return nullcontext()
    context: AbstractContextManager[object] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return context


def _attend(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    with attention_kernels(query.shape[:-1].numel() * keys.shape[-2], query.device):
        return F.scaled_dot_product_attention(query, keys, values, **options)


def _pad_rows(x: Tensor, dim: int) -> Tensor:
    last = x.shape[dim] % ROW_SPLIT
    missing = MIN_ROWS - last
    if x.device.type != "cpu" or last == 0 or missing <= 0:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention within whole sequences, without a cache.

    Args: query [batch, tokens, heads, head_dim]; keys, values [batch, tokens, kv_heads, head_dim].
    Returns [batch, tokens, heads * head_dim].
    """
    out = _attend(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)
