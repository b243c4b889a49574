"""Small kernels of a draft on a GPU: what lies between the drafter's products, in one launch each.

The products leave partial sums (`split_product`), float32 [parts, rows, out], which the kernel after them adds up. An
FP8 product takes each row divided by a scale of its own, which nothing has calibrated: to find it a program must see
the whole row, so there is one program a row. The reference is `Redrafter`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.kernels import load_sum, round_row
from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous
from fourfold.modeling.trunk_kernels import Candidates, Drafted, choose


@dataclass
class Activations:
    """What a product takes."""

    values: Tensor
    """[rows, size]."""
    scales: Tensor | None = None
    """What each row's result is to be multiplied with: float32 [rows], where values are E4M3."""


@triton.jit(do_not_specialize=["step"])
def _advance(
    tokens: tl.tensor,
    scores: tl.tensor,
    masses: tl.tensor,
    drafted: tl.tensor,
    log_p: tl.tensor,
    table: tl.tensor,
    product: tl.tensor,
    state: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    steps: tl.tensor,
    width: tl.tensor,
    size: tl.tensor,
    RNN: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    place, there = row * size + column, column < size
    wait_for_previous()
    let_next_start()
    token = choose(tokens, scores, masses, drafted, log_p, count, step, steps, WIDTH, COUNT)
    # Tokens have 64 bits, so that the table may have more elements than 32 bits count.
    value = tl.load(table + token * size + column, mask=there, other=0.0).to(tl.float32)
    if PARTS > 0:
        value += load_sum(product, row * width + width - size + column, there, tl.num_programs(0) * width, PARTS)
    if RNN:
        value *= tl.sigmoid(value)
    elif scores is not None:
        value += tl.load(state + place, mask=there, other=0.0).to(tl.float32)
    _leave(value, state, out, scales, place, there)


@triton.jit
def _leave(
    value: tl.tensor, kept: tl.tensor, out: tl.tensor, scales: tl.tensor, place: tl.tensor, there: tl.tensor
) -> None:
    """Stores a program's row as it is kept, and rounded for a product in FP8 where there is one."""
    value = value.to(kept.dtype.element_ty)
    tl.store(kept + place, value, mask=there)
    if out is not None:
        round_row(value.to(tl.float32), out, scales, place, there)


def advance(
    state: Tensor,
    candidates: Candidates,
    table: Tensor,
    product: Tensor | None,
    drafted: Drafted,
    step: int,
    rnn: bool,
    fp8: bool,
) -> Activations:
    """Chooses each row's most likely tokens and advances the recurrence by the best.

    Args:
        state: [rows, hidden], changed in place. At step 0 it counts as zero, whatever it holds.
        candidates: the tokens to choose from; at step 0 the newest tokens.
        table: [vocab, hidden], what each token adds: rnn_w(embedding) + rnn_u's bias, or the embedding itself.
        product: partial, [parts, rows, hidden or more]: its last columns are rnn_u's product without bias. None at step
            0, and without a recurrent network.
        drafted: what is chosen at a step is stored at that depth.
        step: tokens that this draft has chosen before.
        rnn: as in `RedrafterConfig`.
        fp8: round the state for a product in FP8.
    Returns the new state as the next product takes it.
    """
    rows, size = state.shape
    result = _activations(state, fp8)
    parts, width = (0, 0) if product is None else (product.shape[0], product.shape[2])
    count = candidates.tokens.shape[1]
    _advance[(rows,)](
        candidates.tokens,
        candidates.scores,
        candidates.masses,
        drafted.tokens,
        drafted.log_p,
        table,
        product,
        state,
        result.values if fp8 else None,
        result.scales,
        count,
        step,
        drafted.tokens.shape[1],
        width,
        size,
        RNN=rnn,
        PARTS=parts,
        WIDTH=drafted.tokens.shape[2],
        COUNT=triton.next_power_of_2(count),
        **_one_program_a_row(size),
    )
    return result


@triton.jit
def _block(
    product: tl.tensor,
    fixed: tl.tensor,
    hidden: tl.tensor,
    state: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    half: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    FIXED_PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column, rows = tl.program_id(0), tl.arange(0, BLOCK), tl.num_programs(0)
    place, there = row * size + column, column < size
    wait_for_previous()
    let_next_start()
    value = load_sum(product, row * width + column, there, rows * width, PARTS)
    if FIXED_PARTS > 0:
        value += load_sum(fixed, place, there, rows * size, FIXED_PARTS)
    if RESIDUAL:
        value *= tl.sigmoid(value)
        if hidden is not None:
            # The block's input is both, side by side: each has zeros where the other is.
            value += tl.load(hidden + row * half + column, mask=column < half, other=0.0).to(tl.float32)
            right = row * half + column - half
            value += tl.load(state + right, mask=there & (column >= half), other=0.0).to(tl.float32)
        else:
            value += tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    _leave(value, x, out, scales, place, there)


def first_layer(
    product: Tensor, fixed: Tensor, hidden: Tensor, state: Tensor, x: Tensor, residual: bool, fp8: bool
) -> Activations:
    """The head's first layer, from its product's two halves: a residual block, or the input projection.

    Args:
        product: partial, [parts, rows, exit_dim or more]: the first columns are the product with the state.
        fixed: partial, [parts, rows, exit_dim]: the product with the target's state, and the bias.
        hidden, state: [rows, hidden], the target's state and the recurrence's.
        x: [rows, exit_dim], overwritten with the result.
        residual: whether it is a residual block; exit_dim is then 2 x hidden.
        fp8: round the result for a product in FP8.
    Returns the result as the next product takes it.
    """
    return _launch_block(product, fixed, hidden, state, x, residual, fp8)


def residual_block(product: Tensor, x: Tensor, fp8: bool) -> Activations:
    """x + silu(product).

    Args:
        product: partial, [parts, rows, exit_dim], bias included.
        x: [rows, exit_dim], changed in place.
        fp8: round the result for a product in FP8.
    Returns the result as the next product takes it.
    """
    return _launch_block(product, None, None, None, x, True, fp8)


def _launch_block(
    product: Tensor,
    fixed: Tensor | None,
    hidden: Tensor | None,
    state: Tensor | None,
    x: Tensor,
    residual: bool,
    fp8: bool,
) -> Activations:
    rows, size = x.shape
    result = _activations(x, fp8)
    _block[(rows,)](
        product,
        fixed,
        hidden,
        state,
        x,
        result.values if fp8 else None,
        result.scales,
        product.shape[2],
        0 if hidden is None else hidden.shape[1],
        size,
        PARTS=product.shape[0],
        FIXED_PARTS=0 if fixed is None else fixed.shape[0],
        RESIDUAL=residual,
        **_one_program_a_row(size),
    )
    return result


def _activations(kept: Tensor, fp8: bool) -> Activations:
    """Room for what a product takes; without FP8, that is what is kept."""
    if not fp8:
        return Activations(kept)
    values = torch.empty_like(kept, dtype=torch.float8_e4m3fn)
    return Activations(values, torch.empty(len(kept), dtype=torch.float32, device=kept.device))


def _one_program_a_row(size: int) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), **OPTIONS}
