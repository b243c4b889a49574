"""Small kernels of a decoding step on a GPU: what lies between two matrix products, in one launch each.

Each of them reads its inputs once and writes what the next product takes, in E4M3 where that product is in FP8. A
product may leave its result in parts (`split_product`): tensors that are called partial have a first dimension over
which they are added, and the sum is rounded to the model's dtype. The references are `norm.RmsNorm`, `rope.apply_rope`
with `KVCache.write`, and the model's `_mlp`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous

E4M3_MAX = tl.constexpr(448.0)
ROPE_HEADS = 4
"""Heads of a row that are rotated by one program."""
MERGED_HEADS = 8
"""Heads of a row that are copied by one program."""


@triton.jit
def load_sum(
    partial: tl.tensor, place: tl.tensor, there: tl.tensor, stride: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """The sum over the parts at some places, in float32; parts are `stride` elements apart."""
    total = tl.load(partial + place, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial + part * stride + place, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def load_scale(scale: tl.tensor) -> tl.tensor:
    """A scale that never changes, if there is one. Read before a kernel waits, it costs no time."""
    value = scale
    if scale is not None:
        value = tl.load(scale)
    return value


@triton.jit
def round_to(y: tl.tensor, out: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """y in the dtype that `out` points to; divided by a scale first, if there is one."""
    if scale is not None:
        y = y / scale
    return saturate(y, out)


@triton.jit
def saturate(y: tl.tensor, out: tl.tensor) -> tl.tensor:
    """y in the dtype that `out` points to; values beyond E4M3's range become its largest, and NaN stays NaN."""
    if out.dtype.element_ty == tl.float8e4nv:
        y = tl.clamp(y, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return y.to(out.dtype.element_ty)


@triton.jit
def _add_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    eps: tl.tensor,
    size: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    there = column < size
    scaling = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    divisor = load_scale(out_scale)
    wait_for_previous()
    let_next_start()
    value = tl.load(x + row * size + column, mask=there, other=0.0)
    wide = value.to(tl.float32)
    if delta is not None:
        added = load_sum(delta, row * size + column, there, tl.num_programs(0) * size, PARTS)
        value = (wide + added.to(value.dtype).to(tl.float32)).to(value.dtype)
        tl.store(x + row * size + column, value, mask=there)
        wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)
    # Rounded before the product, as in the reference.
    y = normed.to(value.dtype).to(tl.float32) * scaling
    tl.store(out + row * size + column, round_to(y.to(value.dtype).to(tl.float32), out, divisor), mask=there)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """Adds to the residual stream and normalises it.

    Args:
        x: [rows, hidden], changed in place to x + delta.
        delta: partial, [parts, rows, hidden], or None.
        weight, eps: of the norm.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps the dtype of x.
    Returns RmsNorm(x + delta), [rows, hidden].
    """
    rows, size = x.shape
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else torch.float8_e4m3fn)
    block = triton.next_power_of_2(size)
    warps = min(32, max(1, block // 256))
    parts = 0 if delta is None else delta.shape[0]
    _add_norm[(rows,)](
        x, delta, weight, out, out_scale, eps, size=size, PARTS=parts, BLOCK=block, num_warps=warps, **OPTIONS
    )
    return out


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["positions"])
def _rope_write(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    nodes: tl.tensor,
    query: tl.tensor,
    cache: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    tokens: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some heads of one row. GROUP: query heads that share a key/value head, for prompts; 0 for nodes."""
    row, head, column = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = column < half
    there = (head < heads + 2 * kv_heads)[:, None] & inside[None, :]
    # What a step's forward was given was written before the kernel in front, so it can be read before that one ends.
    node = row if nodes is None else tl.load(nodes + row).to(tl.int32)
    position = tl.load(positions + node)
    token = node % tokens
    # The nodes of a tree lie side by side in the cache, whatever their positions.
    cached_at = position if GROUP else tl.load(positions + node - token) + token
    # The tables' halves are equal but for the sign of the sines; see `rope.rope_tables`.
    c = tl.load(cos + position * 2 * half + column, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + position * 2 * half + half + column, mask=inside, other=0.0)[None, :]
    wait_for_previous()
    let_next_start()
    place = head[:, None] * 2 * half + column[None, :]
    source = row * (heads + 2 * kv_heads) * 2 * half + place
    stride = tl.num_programs(0) * (heads + 2 * kv_heads) * 2 * half
    # Rounded to the model's dtype, as a product's result is, before anything else.
    first = load_sum(qkv, source, there, stride, PARTS).to(query.dtype.element_ty).to(tl.float32)
    second = load_sum(qkv, source + half, there, stride, PARTS).to(query.dtype.element_ty).to(tl.float32)
    rotated = (head < heads + kv_heads)[:, None]
    first, second = (
        tl.where(rotated, first * c - second * s, first),
        tl.where(rotated, second * c + first * s, second),
    )
    asked = there & (head < heads)[:, None]
    queries = query + row * heads * 2 * half + place
    if GROUP:
        shared = (node // tokens * kv_heads + head // GROUP) * tokens + token
        queries = query + (shared * GROUP + head % GROUP)[:, None] * 2 * half + column[None, :]
    tl.store(queries, first.to(query.dtype.element_ty), mask=asked)
    tl.store(queries + half, second.to(query.dtype.element_ty), mask=asked)
    written = there & (head >= heads)[:, None]
    slot = (node // tokens).to(tl.int64) * slot_stride + (head - heads).to(tl.int64)[:, None] * head_stride
    cached = cache + slot + cached_at * 2 * half + column[None, :]
    tl.store(cached, saturate(first, cache), mask=written)
    tl.store(cached + half, saturate(second, cache), mask=written)


def rope_write(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    keys_values: Tensor,
    dtype: torch.dtype,
    nodes: Tensor | None = None,
    prompts: bool = False,
) -> Tensor:
    """Rotates new tokens' queries and keys, and writes the keys and the values to the cache.

    Args:
        qkv: partial, [parts, rows, (heads + 2 * kv_heads) * head_dim], contiguous.
        tables: from `rope.rope_tables`, for all positions of the cache.
        positions: int64 [batch, tokens], contiguous: what is rotated by. Token i of a sequence goes to place start + i
            of the cache, where start is the position of its first one; those of prompts go to their own positions. They
            and nodes are read before the kernel in front has ended: it must not be the one that writes them.
        keys_values: one layer of the cache, [slots, 2 * kv_heads, length, head_dim], contiguous.
        dtype: the model's.
        nodes: int64 [rows], contiguous: which of `positions`, flattened, is each row's; None: rows are batch * tokens
            in their order.
        prompts: whether these are parts of prompts.
    Returns the queries, [rows, heads, head_dim], in `dtype`; those of prompts as the rows of `grouped_attention`,
    [batch, kv_heads, tokens * group, head_dim].
    """
    rows, (batch, tokens), dim = qkv.shape[1], positions.shape, keys_values.shape[-1]
    kv_heads = keys_values.shape[1] // 2
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    group = heads // kv_heads
    shape = (batch, kv_heads, tokens * group, dim) if prompts else (rows, heads, dim)
    query = torch.empty(shape, dtype=dtype, device=qkv.device)
    _rope_write[(rows, triton.cdiv(heads + 2 * kv_heads, ROPE_HEADS))](
        qkv,
        *tables,
        positions,
        nodes,
        query,
        keys_values,
        keys_values.stride(0),
        keys_values.stride(1),
        tokens,
        heads=heads,
        kv_heads=kv_heads,
        half=dim // 2,
        PARTS=qkv.shape[0],
        HEADS=ROPE_HEADS,
        GROUP=group if prompts else 0,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=2,
        **OPTIONS,
    )
    return query


@triton.jit(do_not_specialize=["tokens"])
def _merge_heads(
    attended: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    row_stride: tl.tensor,
    tokens: tl.tensor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some heads of one row."""
    row, head, column = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    there = (head < heads)[:, None] & (column < dim)[None, :]
    divisor = load_scale(out_scale)
    source = attended + (row // tokens).to(tl.int64) * batch_stride + (row % tokens * GROUP).to(tl.int64) * row_stride
    place = head // GROUP * head_stride + head % GROUP * row_stride
    wait_for_previous()
    let_next_start()
    value = tl.load(source + place[:, None] + column[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * heads * dim + head[:, None] * dim + column[None, :], round_to(value, out, divisor), mask=there)


def merge_heads(attended: Tensor, tokens: int, out_scale: Tensor | None = None) -> Tensor:
    """Puts the heads of each token side by side again.

    Args:
        attended: of prompts' queries as `rope_write` gives them, [batch, kv_heads, tokens * group, head_dim], in the
            model's dtype; the last dimension contiguous.
        tokens: of each sequence.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps the dtype.
    Returns [batch * tokens, kv_heads * group * head_dim].
    """
    batch, kv_heads, rows, dim = attended.shape
    group = rows // tokens
    dtype = attended.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(batch * tokens, kv_heads * group * dim, dtype=dtype, device=attended.device)
    _merge_heads[(batch * tokens, triton.cdiv(kv_heads * group, MERGED_HEADS))](
        attended,
        out,
        out_scale,
        *attended.stride()[:3],
        tokens,
        heads=kv_heads * group,
        dim=dim,
        GROUP=group,
        HEADS=MERGED_HEADS,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **OPTIONS,
    )
    return out


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """silu(gate) * up in float32; rounded to the model's dtype where the reference rounds."""
    wide = gate.to(DTYPE).to(tl.float32)
    y = (wide * tl.sigmoid(wide)).to(DTYPE).to(tl.float32) * up.to(DTYPE).to(tl.float32)
    return y.to(DTYPE).to(tl.float32)


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, stride = column < size, tl.num_programs(0) * 2 * size
    divisor = load_scale(out_scale)
    wait_for_previous()
    let_next_start()
    gate = load_sum(gate_up, row * 2 * size + column, there, stride, PARTS)
    up = load_sum(gate_up, row * 2 * size + size + column, there, stride, PARTS)
    tl.store(out + row * size + column, round_to(gated(gate, up, DTYPE), out, divisor), mask=there)


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def silu_mul(gate_up: Tensor, dtype: torch.dtype, out_scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: partial, [parts, rows, 2 * size], contiguous: gates, then what they are multiplied with.
        dtype: the model's.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps `dtype`.
    Returns [rows, size].
    """
    parts, rows, size = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    out = torch.empty(rows, size, dtype=dtype if out_scale is None else torch.float8_e4m3fn, device=gate_up.device)
    block = 1024
    _silu_mul[(rows, triton.cdiv(size, block))](
        gate_up, out, out_scale, size, PARTS=parts, DTYPE=DTYPES[dtype], BLOCK=block, num_warps=4, **OPTIONS
    )
    return out


@triton.jit
def round_row(y: tl.tensor, out: tl.tensor, scales: tl.tensor, place: tl.tensor, there: tl.tensor) -> None:
    """Stores a program's row in E4M3; its scale is the power of two at which its largest value is still in range."""
    # A row of zeros has no range; any scale will do.
    scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(y)) / E4M3_MAX, 1e-30))))
    tl.store(scales + tl.program_id(0), scale.to(scales.dtype.element_ty))
    tl.store(out + place, saturate(y / scale, out), mask=there)


@triton.jit
def _round_rows(x: tl.tensor, out: tl.tensor, scales: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    column = tl.arange(0, BLOCK)
    place, there = tl.program_id(0) * size + column, column < size
    wait_for_previous()
    let_next_start()
    round_row(tl.load(x + place, mask=there, other=0.0).to(tl.float32), out, scales, place, there)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to E4M3 with a scale of its own: the power of two at which its largest value is still in range.

    Args: x [rows, size], contiguous. Returns (float8_e4m3fn [rows, size]; scales [rows, 1] in the dtype of x, exact).
    """
    rows, size = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=x.dtype, device=x.device)
    _round_rows[(rows,)](x, out, scales, size, BLOCK=triton.next_power_of_2(size), num_warps=8, **OPTIONS)
    return out, scales
