"""Small kernels of a decoding step on a GPU: what lies between two matrix products, in one launch each.

Each of them reads its inputs once and writes what the next product takes, in E4M3 where that product is in FP8. The
references are `norm.RmsNorm`, `rope.apply_rope` with `KVCache.write`, and the model's `_mlp`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def round_to(y: tl.tensor, out: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """y in the dtype that `out` points to; divided by a scale and saturated first, if there is one."""
    if scale is not None:
        y = tl.minimum(tl.maximum(y / tl.load(scale), -E4M3_MAX), E4M3_MAX)
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
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    there = column < size
    value = tl.load(x + row * size + column, mask=there, other=0.0)
    wide = value.to(tl.float32)
    if delta is not None:
        value = (wide + tl.load(delta + row * size + column, mask=there, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(x + row * size + column, value, mask=there)
        wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)
    # Rounded before the product, as in the reference.
    y = normed.to(value.dtype).to(tl.float32) * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, round_to(y.to(value.dtype).to(tl.float32), out, out_scale), mask=there)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """Adds to the residual stream and normalises it.

    Args:
        x: [rows, hidden], changed in place to x + delta.
        delta: of the same shape, or None.
        weight, eps: of the norm.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps the dtype of x.
    Returns RmsNorm(x + delta), [rows, hidden].
    """
    rows, size = x.shape
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else torch.float8_e4m3fn)
    block = triton.next_power_of_2(size)
    warps = min(8, max(1, block // 512))
    _add_norm[(rows,)](x, delta, weight, out, out_scale, eps, size=size, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def _rope_write(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    cache: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, head, column = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    there = column < half
    position = tl.load(positions + row)
    source = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * half + column
    first, second = tl.load(source, mask=there, other=0.0), tl.load(source + half, mask=there, other=0.0)
    if head < heads + kv_heads:
        # The tables' halves are equal but for the sign of the sines; see `rope.rope_tables`.
        c = tl.load(cos + position * 2 * half + column, mask=there, other=0.0)
        s = tl.load(sin + position * 2 * half + half + column, mask=there, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(second.dtype)
    target = source
    if head >= heads:
        slot = (row // tokens).to(tl.int64) * slot_stride + (head - heads).to(tl.int64) * head_stride
        target = cache + slot + position * 2 * half + column
    tl.store(target, first, mask=there)
    tl.store(target + half, second, mask=there)


def rope_write(qkv: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor, keys_values: Tensor) -> None:
    """Rotates new tokens' queries in place, and writes their rotated keys and their values to the cache.

    Args:
        qkv: [batch, tokens, heads + 2 * kv_heads, head_dim], contiguous, in the cache's dtype.
        tables: from `rope.rope_tables`, for all positions of the cache.
        positions: int64 [batch, tokens], contiguous.
        keys_values: one layer of the cache, [slots, 2 * kv_heads, length, head_dim], contiguous.
    """
    batch, tokens, heads, dim = qkv.shape
    kv_heads = keys_values.shape[1] // 2
    _rope_write[(batch * tokens, heads)](
        qkv,
        *tables,
        positions,
        keys_values,
        keys_values.stride(0),
        keys_values.stride(1),
        tokens=tokens,
        heads=heads - 2 * kv_heads,
        kv_heads=kv_heads,
        half=dim // 2,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, out_scale: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=there, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=there, other=0.0)
    wide = gate.to(tl.float32)
    y = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * size + column, round_to(y.to(gate.dtype).to(tl.float32), out, out_scale), mask=there)


def silu_mul(gate_up: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [rows, 2 * size], contiguous: gates, then what they are multiplied with.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps the dtype.
    Returns [rows, size].
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = gate_up.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(rows, size, dtype=dtype, device=gate_up.device)
    block = 1024
    _silu_mul[(rows, triton.cdiv(size, block))](gate_up, out, out_scale, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _round_rows(x: tl.tensor, out: tl.tensor, scales: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    there = column < size
    value = tl.load(x + row * size + column, mask=there, other=0.0).to(tl.float32)
    # A row of zeros has no range; any scale will do.
    scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(value)) / E4M3_MAX, 1e-30))))
    tl.store(scales + row, scale.to(scales.dtype.element_ty))
    y = tl.minimum(tl.maximum(value / scale, -E4M3_MAX), E4M3_MAX)
    tl.store(out + row * size + column, y.to(out.dtype.element_ty), mask=there)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to E4M3 with a scale of its own: the power of two at which its largest value is still in range.

    Args: x [rows, size], contiguous. Returns (float8_e4m3fn [rows, size]; scales [rows, 1] in the dtype of x, exact).
    """
    rows, size = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=x.dtype, device=x.device)
    _round_rows[(rows,)](x, out, scales, size, BLOCK=triton.next_power_of_2(size), num_warps=8)
    return out, scales
