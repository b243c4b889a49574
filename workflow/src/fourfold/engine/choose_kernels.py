"""Choosing tokens on a GPU: `sampling.choose` for all rows of logits, greedy and sampled ones, in three launches.

The vocabulary is split among programs. The first launch finds each part's maximum, the second the sum of each part's
weights (none is needed where all requests are greedy), the third the token: a sampled one by the inverse of the
distribution function, first among the parts, then within one. A weight is exp((logit - maximum) / temperature) in
float32, as in PyTorch's softmax, and the same wherever it is computed; they are added in float64. Logits are read as
the output matrix gives them. The reference is `sampling.choose`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.engine.sampling import SamplingBatch
from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous

BLOCK = 2048
"""Tokens of a part."""
WARPS = 8
"""Of the program that picks a token; it has a place for each of their threads at least."""
NONE = tl.constexpr(2**31 - 1)
"""Beyond all tokens and parts."""
UNIT = tl.constexpr(2.0**-53)


@triton.jit
def _maxima(
    logits: tl.tensor, maxima: tl.tensor, firsts: tl.tensor, vocab: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The largest logit of one part of one row, and the first token that has it; token -1 where a logit is NaN."""
    row, part = tl.program_id(0), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous()
    let_next_start()
    value = tl.load(logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(value)
    first = tl.min(tl.where(value == top, token, NONE))
    broken = tl.max((value != value).to(tl.int32))
    tl.store(maxima + row * PARTS + part, top)
    tl.store(firsts + row * PARTS + part, tl.where(broken > 0, -1, first))


@triton.jit
def _weights(
    logits: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
) -> tl.tensor:
    """Weights of a row's tokens, the most likely one's being 1: float32. 0 instead of NaN."""
    value = tl.load(logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    weight = tl.exp((value - top) / temperature)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def _sums(
    logits: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    vocab: tl.tensor,
    nodes: tl.tensor,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of the weights of one part of one row."""
    row, part, each = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE)
    token = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous()
    let_next_start()
    top = tl.max(tl.load(maxima + row * PARTS + each, mask=each < PARTS, other=float("-inf")))
    request = row // nodes
    temperature, min_p = tl.load(temperatures + request), tl.load(min_ps + request)
    if temperature > 0:
        weight = _weights(logits, row, token, vocab, top, temperature, min_p)
        tl.store(sums + row * PARTS + part, tl.sum(weight.to(tl.float64)))


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """As in `sampling`; shifts of uint64 are those of the bare bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """`sampling.uniforms` of int64 seeds and indices: float64."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    state = _mix(state ^ _mix(index.to(tl.uint64, bitcast=True) + 0xD1B54A32D192ED03))
    return (state >> 11).to(tl.int64).to(tl.float64) * UNIT


@triton.jit
def _place(weight: tl.tensor, target: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The first place whose running sum exceeds the target; the last one with a weight where rounding left none.

    Never a place of weight 0: a running sum that is added up in parallel may grow there by a rounding.
    """
    there = weight > 0
    place = tl.min(tl.where(there & (tl.cumsum(weight, 0) > target), at, NONE))
    return tl.where(place == NONE, tl.max(tl.where(there, at, 0)), place)


@triton.jit
def _pick(
    logits: tl.tensor,
    maxima: tl.tensor,
    firsts: tl.tensor,
    sums: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    generated: tl.tensor,
    greedy: tl.tensor,
    depths: tl.tensor,
    out: tl.tensor,
    vocab: tl.tensor,
    nodes: tl.tensor,
    depth_stride: tl.tensor,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The token of one row."""
    row, each, at = tl.program_id(0), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    request, node, there = row // nodes, row % nodes, each < PARTS
    wait_for_previous()
    let_next_start()
    maximum = tl.load(maxima + row * PARTS + each, mask=there, other=float("-inf"))
    first = tl.load(firsts + row * PARTS + each, mask=there, other=NONE)
    top, broken = tl.max(maximum), tl.min(first) < 0
    token = tl.min(tl.where(maximum == top, first, NONE))
    if sums is not None:
        temperature, min_p = tl.load(temperatures + request), tl.load(min_ps + request)
        drawn = temperature > 0
        if greedy is not None:
            drawn = drawn & (tl.load(greedy + request) == 0)
        if drawn:
            index = tl.load(generated + request)
            if depths is not None:
                index += tl.load(depths + request * depth_stride + node)
            mass = tl.load(sums + row * PARTS + each, mask=there, other=0.0)
            total = tl.sum(mass)
            target = _uniform(tl.load(seeds + request), index) * total
            part = _place(mass, target, each)
            target -= tl.sum(tl.where(each < part, mass, 0.0))
            weight = _weights(logits, row, part * BLOCK + at, vocab, top, temperature, min_p)
            token = part * BLOCK + _place(weight.to(tl.float64), target, at)
            # An infinite logit leaves no distribution; elsewhere the most likely token has a weight.
            broken = broken | (total == 0)
    tl.store(out + row, tl.where(broken, -1, token).to(tl.int64))


def choose_nodes(logits: Tensor, batch: SamplingBatch, index: Tensor, depths: Tensor | None = None) -> Tensor:
    """The next token at each node of each request's draft; what `sampling.choose` chooses, without top_k and top_p.

    Args:
        logits: [batch, nodes, vocab], in any floating dtype.
        batch: sampling parameters, a row for each request.
        index: int64 [batch], how many tokens each has generated.
        depths: int64 [batch, nodes], how many more there are at each node; the last dimension contiguous. None: none.
    Returns int64 [batch, nodes]; -1 where `sampling.choose` gives it.
    """
    requests, nodes, vocab = logits.shape
    rows, parts, logits = requests * nodes, triton.cdiv(vocab, BLOCK), logits.contiguous()
    device = logits.device
    maxima = torch.empty(rows, parts, dtype=torch.float32, device=device)
    firsts = torch.empty(rows, parts, dtype=torch.int32, device=device)
    out = torch.empty(requests, nodes, dtype=torch.int64, device=device)
    sums = torch.empty(rows, parts, dtype=torch.float64, device=device) if batch.has_sampled else None
    limits = batch.temperature, batch.min_p
    _maxima[(rows, parts)](logits, maxima, firsts, vocab, PARTS=parts, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    sizes: dict[str, Any] = {"PARTS": parts, "WIDE": max(32 * WARPS, triton.next_power_of_2(parts)), "BLOCK": BLOCK}
    if sums is not None:
        _sums[(rows, parts)](logits, maxima, sums, *limits, vocab, nodes, **sizes, num_warps=4, **OPTIONS)
    _pick[(rows,)](
        logits,
        maxima,
        firsts,
        sums,
        *limits,
        batch.seed,
        index,
        batch.greedy,
        depths,
        out,
        vocab,
        nodes,
        0 if depths is None else depths.stride(0),
        **sizes,
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
