"""Attention of a decoding step on a GPU: the keys of a sequence are split among programs, and the parts combined.

A step has few query tokens and many keys, so a program for each sequence and head would leave most of the GPU idle
(flash-decoding, Dao et al. 2023). Here a program takes one sequence, one key/value head and one part of the keys. All
query heads that share the head, for all new tokens, are the rows of its products, so keys and values are read once.
The number of parts is fixed by the batch alone and their borders come from the positions, which stay on the GPU: the
same launch serves any lengths, as a CUDA graph needs. The reference is `attention.grouped_attention`.

The new tokens follow each other, or they are the nodes of a tree: then each has a mask that says which of them it sees.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.e4m3_pairs import unpack
from fourfold.modeling.kernels import load_scale, round_to
from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous
from fourfold.modeling.split_product import MIN_ROWS
from fourfold.modeling.trunk_tree import MAX_NODES

BLOCK = 64
"""Keys in one product."""
MANY_PARTS = 16
"""From so many parts on each has few keys: then, and where they take more memory than in E4M3, it is half a block."""
PROGRAMS = 264
"""Programs that keep a GPU busy: two for each multiprocessor of a large one."""
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit(do_not_specialize_on_alignment=["positions", "masks"])
def _attend(
    query: tl.tensor,
    cache: tl.tensor,
    positions: tl.tensor,
    masks: tl.tensor,
    rows: tl.tensor,
    partial: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    query_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    tokens: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One part of the keys of one sequence and key/value head: the weighted sum of values, not yet divided."""
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = row // group
    # What a step's forward was given was written before the kernel in front, so it can be read before that one ends.
    root = tl.load(positions + sequence * tokens).to(tl.int32)
    there = token < tokens
    if rows is None:
        query_row, length = sequence * tokens + token, root + tokens
    else:
        query_row = tl.load(rows + sequence * tokens + token, mask=there, other=-1).to(tl.int32)
        there = query_row >= 0
        length = root + tl.max(tl.where(there, token, 0)) + 1
    each = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    start = part * each
    stop = tl.minimum(start + each, length)
    if masks is not None:
        mask = tl.load(masks + sequence * tokens + token, mask=there, other=0)
    wait_for_previous()
    let_next_start()
    query_head, used = head * group + row % group, there[:, None] & (column < dim)[None, :]
    source = query_row * query_stride + query_head * dim
    q = tl.load(query + source[:, None] + column[None, :], mask=used, other=0.0)
    # Two E4M3 values are one number of the cache, so that a row of it is half as long.
    PAIRS: tl.constexpr = cache.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = DIM // 2 if PAIRS else DIM
    width: tl.constexpr = dim // 2 if PAIRS else dim
    if PAIRS:
        if q.dtype == tl.bfloat16:
            # The GPU converts E4M3 to float16 in one instruction, and to bfloat16 in several. A query is exact in
            # float16 as well, but for values so small or so large that they decide nothing or everything.
            q = tl.clamp(q.to(tl.float32), -FLOAT16_MAX, FLOAT16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
        even, odd = tl.split(tl.reshape(q, (ROWS, WIDTH, 2)))
        acc_even = tl.zeros([ROWS, WIDTH], tl.float32)
        acc_odd = tl.zeros([ROWS, WIDTH], tl.float32)
    else:
        acc = tl.zeros([ROWS, DIM], tl.float32)
    # A large cache has more elements than 32 bits count.
    keys = cache + sequence.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride
    values = keys + kv_heads * head_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    number = tl.arange(0, WIDTH)
    for key in range(start, stop, BLOCK):
        place = key + tl.arange(0, BLOCK)
        inside = (place < stop)[:, None] & (number < width)[None, :]
        offset = place[:, None] * width + number[None, :]
        k = tl.load(keys + offset, mask=inside, other=0)
        if PAIRS:
            first, second = unpack(k)
            score = tl.dot(even, tl.trans(first.to(q.dtype)), input_precision="ieee")
            score = tl.dot(odd, tl.trans(second.to(q.dtype)), score, input_precision="ieee") * scale
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # All see the root and what is before it, so most blocks have nothing to hide.
        if key + BLOCK > root + 1:
            node = place - root
            if masks is None:
                seen = node[None, :] <= token[:, None]
            else:
                bit = tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)
                seen = (node <= 0)[None, :] | ((mask[:, None] >> bit[None, :]) & 1 != 0)
            score = tl.where(seen & (place < stop)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # A row that has seen no key yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        weight = weight.to(q.dtype)
        v = tl.load(values + offset, mask=inside, other=0)
        if PAIRS:
            first, second = unpack(v)
            acc_even = acc_even * shrink[:, None] + tl.dot(weight, first.to(q.dtype), input_precision="ieee")
            acc_odd = acc_odd * shrink[:, None] + tl.dot(weight, second.to(q.dtype), input_precision="ieee")
        else:
            acc = acc * shrink[:, None] + tl.dot(weight, v, input_precision="ieee")
        top = higher
    if PAIRS:
        acc = tl.interleave(acc_even, acc_odd)
    # [rows, heads, parts(, dim)]: what is combined lies together.
    place = (query_row * kv_heads * group + query_head) * parts + part
    tl.store(partial + place[:, None] * dim + column[None, :], acc, mask=used)
    tl.store(maxima + place, top, mask=there)
    tl.store(sums + place, total, mask=there)


@triton.jit
def _combine(
    partial: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    dim: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """All parts of one query row and head."""
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    part, column = tl.arange(0, PARTS), tl.arange(0, DIM)
    divisor = load_scale(out_scale)
    wait_for_previous()
    let_next_start()
    top = tl.load(maxima + row * PARTS + part)
    weight = tl.exp2(top - tl.max(top))
    total = tl.sum(weight * tl.load(sums + row * PARTS + part))
    place = (row * PARTS + part)[:, None] * dim + column[None, :]
    acc = tl.load(partial + place, mask=(column < dim)[None, :], other=0.0)
    y = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out + row * dim + column, round_to(y, out, divisor), mask=column < dim)


def parts_for(batch: int, kv_heads: int, length: int) -> int:
    """Into how many parts the keys of a sequence are split: a power of two, at most the blocks of `length` keys."""
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, batch * kv_heads))
    return min(wanted, triton.next_power_of_2(triton.cdiv(length, BLOCK)))


def split_attention(
    query: Tensor,
    keys_values: Tensor,
    positions: Tensor,
    masks: Tensor | None = None,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    parts: int | None = None,
) -> Tensor:
    """Attention of new tokens to the cached ones, their own among them.

    Args:
        query: [rows, heads, head_dim], RoPE applied; the last two dimensions contiguous.
        keys_values: one layer of the cache, [slots, 2 * kv_heads, length, head_dim], contiguous, in the query's dtype
            or E4M3; the sequences' slots are the first ones.
        positions: int64 [batch, tokens], contiguous. The keys of token i of a sequence lie at place start + i, where
            start is the position of its first one; every token sees the places up to start. They, masks and rows are
            read before the kernel in front has ended: it must not be the one that writes them.
        masks: int64 [batch, tokens], contiguous, for MAX_NODES tokens at most: a token sees place start + j if bit j is
            set. None: it sees the places up to its own.
        rows: int64 [batch, tokens], contiguous: the query's row of each token, -1 for what is none and comes behind
            those that are; the first is one. None: rows are batch * tokens in their order.
        out_dtype: dtype of the result; None keeps that of the query.
        out_scale: float32 scalar that the result is divided by, for out_dtype float8_e4m3fn.
        parts: into how many parts the keys are split; None chooses.
    Returns [rows, heads * head_dim].
    """
    (queries, heads, dim), (batch, tokens) = query.shape, positions.shape
    kv_heads, length = keys_values.shape[1] // 2, keys_values.shape[2]
    group = heads // kv_heads
    assert masks is None or tokens <= MAX_NODES, "more nodes than a mask has bits"
    # The kernel reads E4M3 in pairs.
    cache = keys_values.view(torch.int16) if keys_values.dtype == torch.float8_e4m3fn else keys_values
    parts = parts or parts_for(batch, kv_heads, length)
    sizes = (queries, heads, parts)
    partial = torch.empty(*sizes, dim, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, *sizes, dtype=torch.float32, device=query.device)
    wide = triton.next_power_of_2(dim)
    half = cache is keys_values or parts >= MANY_PARTS
    padded = max(MIN_ROWS.value, triton.next_power_of_2(tokens * group))
    _attend[(batch, kv_heads, parts)](
        query,
        cache,
        positions,
        masks,
        rows,
        partial,
        maxima,
        sums,
        dim**-0.5 * 1.4426950408889634,  # log2(e): powers of two are what the GPU computes
        query.stride(0),
        cache.stride(0),
        cache.stride(1),
        tokens=tokens,
        group=group,
        dim=dim,
        ROWS=padded,
        DIM=wide,
        BLOCK=BLOCK // 2 if half else BLOCK,
        # As few as have the registers for the sums.
        num_warps=8 if padded > 64 else 2 if half and padded <= 32 else 4,
        num_stages=3,
        **OPTIONS,
    )
    out = torch.empty(queries, heads * dim, dtype=out_dtype or query.dtype, device=query.device)
    _combine[(queries, heads)](
        partial,
        maxima,
        sums,
        out,
        out_scale,
        dim=dim,
        PARTS=parts,
        DIM=wide,
        num_warps=1 if parts <= 8 else 4,
        **OPTIONS,
    )
    return out
