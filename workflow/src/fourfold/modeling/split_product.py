"""Matrix products of a few rows on a GPU, bound by reading the weights: `F.linear` in parts.

Few rows mean few tiles of the result, and few programs do not read at the full bandwidth. So the sum over the input is
split among programs too, and each leaves a partial sum in float32; the kernel that comes next reads and adds them
anyway. The weight takes the place of the left operand: its rows fill a tensor core's 64, tokens its 16 or more columns.

Before a program waits for the kernel in front of it, it asks for the first bytes of its weights, which then arrive
while that kernel still runs. Sizes of tiles were chosen by measurement on an H200; docs/performance.md has the figures.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.kernels import DTYPES, gated, load_scale, round_to
from fourfold.modeling.launch import EARLY, OPTIONS, let_next_start, wait_for_previous

MAX_ROWS = 64
"""Beyond this many rows the products of PyTorch are as quick."""
MIN_ROWS = tl.constexpr(16)
"""Rows that a tensor core's product takes at least."""
TILE = 64
"""Rows of the weight that a program takes."""
PROGRAMS = 224
"""Programs that are enough to read at full bandwidth."""
MANY = 400
"""From this many programs on, each keeps less under way."""
PREFETCHED = 16 * 1024
"""Bytes of its weights that a program asks for before it waits."""
LINE = tl.constexpr(128)
"""Bytes that are fetched together."""


@triton.jit
def _tile(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    inputs: tl.tensor,
    part: tl.tensor,
    each: tl.tensor,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ITEM: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Some columns of the result over one part of the sum: float32 [TILE, ROWS]."""
    k, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    start = part * each
    stop = tl.minimum(start + each, inputs)
    # A large matrix has more elements than 32 bits count.
    weights = weight + column.to(tl.int64)[:, None] * inputs
    if EARLY and LINES > 0:
        line = weights + (start + tl.arange(0, LINES) * (LINE // ITEM))[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
    # Weights never change: what belongs to them is here before the sum is. An input's scale may be new.
    if scale is not None:
        factor = tl.load(scale + column, mask=column < columns, other=0.0)[:, None] if SCALED_ROWS else tl.load(scale)
    if bias is not None:
        added = column < tl.where(part == 0, columns, 0)
        offset = tl.load(bias + column, mask=added, other=0.0).to(tl.float32)[:, None]
    wait_for_previous()
    let_next_start()
    if input_scale is not None:
        if SCALED_INPUTS:
            input_factor = tl.load(input_scale + row, mask=row < rows, other=0.0)[None, :]
        else:
            input_factor = tl.load(input_scale)
    acc = tl.zeros([TILE, ROWS], tl.float32)
    for at in range(start, stop, BLOCK):
        used = row[None, :] < rows
        if EVEN:
            w = tl.load(weights + (at + k)[None, :], eviction_policy="evict_first")
        else:
            there = (at + k) < stop
            used = used & there[:, None]
            w = tl.load(weights + (at + k)[None, :], mask=(column < columns)[:, None] & there[None, :], other=0.0)
        a = tl.load(x + row[None, :] * inputs + (at + k)[:, None], mask=used, other=0.0)
        # A tensor core's accumulator for FP8 has 14 bits: after each block the sum goes on in float32.
        acc = tl.dot(w, a, acc, max_num_imprecise_acc=BLOCK, input_precision="ieee")
    if scale is not None:
        acc *= factor
    if input_scale is not None:
        acc *= input_factor
    if bias is not None:
        acc += offset
    return acc


@triton.jit(do_not_specialize=["rows"])
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    inputs: tl.tensor,
    each: tl.tensor,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ITEM: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
) -> None:
    """One tile of the result's columns and one part of the sum."""
    if WHOLE_ROWS:
        rows = rows // MIN_ROWS * MIN_ROWS
    column, row = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, ROWS)
    part = tl.program_id(1)
    acc = _tile(
        x, weight, bias, scale, input_scale, column, rows, columns, inputs, part, each, ROWS, TILE, BLOCK, LINES, ITEM,
        SCALED_ROWS, SCALED_INPUTS, EVEN,
    )  # fmt: skip
    place = (part * rows + row).to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (column < columns)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _gated_product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    inputs: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ITEM: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_INPUTS: tl.constexpr,
) -> None:
    """Half a tile of gates, and what they are multiplied with."""
    divisor = load_scale(out_scale)
    # By eights in turn: row i and i + 8 of a tensor core's result are the same thread's.
    i, row = tl.arange(0, TILE), tl.arange(0, ROWS)
    first = tl.program_id(0) * (TILE // 2)
    column = first + i // 16 * 8 + i % 8 + (i // 8 % 2) * size
    acc = _tile(
        x, weight, bias, scale, input_scale, column, rows, 2 * size, inputs, 0, inputs, ROWS, TILE, BLOCK, LINES, ITEM,
        SCALED_ROWS, SCALED_INPUTS, True,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(acc, [TILE // 16, 2, 8, ROWS]), [0, 2, 3, 1]))
    y = gated(tl.reshape(gate, [TILE // 2, ROWS]), tl.reshape(up, [TILE // 2, ROWS]), DTYPE)
    place = row[None, :] * size + first + tl.arange(0, TILE // 2)[:, None]
    tl.store(out + place, round_to(y, out, divisor), mask=(row < rows)[None, :])


def split_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """x @ weight.T * scale * input_scale + bias, for MAX_ROWS rows at most, as partial sums.

    Args:
        x: [rows, in], contiguous, in the dtype of the weight.
        weight: [out, in], contiguous: bfloat16, float16, float32 or float8_e4m3fn.
        bias: [out] or None; it and `scale` never change: they are read before kernels in front have ended.
        scale: float32, a scalar or [out]; None is 1.
        input_scale: float32 or bfloat16, a scalar or one for each row, [rows] or [rows, 1]; None is 1.
    Returns float32 [parts, rows, out], to be added over the parts.
    """
    (rows, inputs), columns = x.shape, weight.shape[0]
    parts, block = _split(columns, inputs, weight.element_size())
    each = triton.cdiv(triton.cdiv(inputs, block), parts) * block
    parts = triton.cdiv(inputs, each)
    out = torch.empty(parts, rows, columns, dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, scale, input_scale, out, each, block)
    return out


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T * scale * input_scale in one launch, for MAX_ROWS rows at most and a weight too large to split.

    Args: as of `split_product`; dtype of the result. Returns [rows, out].
    """
    (rows, inputs), columns = x.shape, weight.shape[0]
    _, block = _split(columns, inputs, weight.element_size())
    out = torch.empty(1, rows, columns, dtype=dtype, device=x.device)
    _launch(x, weight, None, scale, input_scale, out, inputs, block)
    return out[0]


def multiplies_gates(weight: Tensor) -> bool:
    """Whether `gated_product` takes such a weight: one that is large enough not to be split, and fills its tiles."""
    columns, inputs = weight.shape
    parts, block = _split(columns, inputs, weight.element_size())
    return parts == 1 and inputs % block == 0 and columns % TILE == 0


def gated_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    input_scale: Tensor | None,
    dtype: torch.dtype,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`kernels.silu_mul` of a `split_product` in the same launch: the products never leave the multiprocessor.

    Args:
        x, bias, scale, input_scale: as of `split_product`.
        weight: [2 * size, in], contiguous, gates before what they are multiplied with; see `multiplies_gates`.
        dtype: the model's.
        out_scale: float32 scalar: the result is divided by it and rounded to E4M3; None keeps `dtype`.
    Returns [rows, size].
    """
    (rows, inputs), size = x.shape, weight.shape[0] // 2
    out = torch.empty(rows, size, dtype=dtype if out_scale is None else torch.float8_e4m3fn, device=x.device)
    _, block = _split(2 * size, inputs, weight.element_size())
    _gated_product[(2 * size // TILE,)](
        x,
        weight,
        bias,
        scale,
        input_scale,
        out,
        out_scale,
        rows,
        size,
        inputs,
        DTYPE=DTYPES[dtype],
        **_options(x, weight, scale, input_scale, True, block),
    )
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    each: int,
    block: int,
) -> None:
    """Computes `out`, [parts, rows, columns], of which each part is the sum over `each` inputs."""
    columns, inputs = weight.shape
    even = inputs % block == 0 and columns % TILE == 0
    _product[(triton.cdiv(columns, TILE), len(out))](
        x,
        weight,
        bias,
        scale,
        input_scale,
        out,
        len(x),
        columns,
        inputs,
        each,
        EVEN=even,
        # Many rows are masked in fewer instructions where their number is known to be a multiple.
        WHOLE_ROWS=len(x) > 2 * MIN_ROWS.value and len(x) % MIN_ROWS.value == 0,
        **_options(x, weight, scale, input_scale, even, block),
    )


def _options(
    x: Tensor, weight: Tensor, scale: Tensor | None, input_scale: Tensor | None, even: bool, block: int
) -> dict[str, Any]:
    """What a product's kernel is compiled for."""
    return {
        "ROWS": max(MIN_ROWS.value, triton.next_power_of_2(x.shape[0])),
        "TILE": TILE,
        "BLOCK": block,
        "LINES": PREFETCHED // TILE // LINE.value if even else 0,
        "ITEM": weight.element_size(),
        "SCALED_ROWS": scale is not None and scale.numel() > 1,
        "SCALED_INPUTS": input_scale is not None and input_scale.numel() > 1,
        "num_warps": 4,
        "num_stages": 3,
        **OPTIONS,
    }


def _split(columns: int, inputs: int, item: int) -> tuple[int, int]:
    """How a product is split: into how many parts, and inputs of a block. item: bytes of a weight."""
    tiles = triton.cdiv(columns, TILE)
    lines = 1 if tiles >= MANY else 2
    block = lines * LINE.value // item
    parts = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(inputs, block))
    return parts, block
