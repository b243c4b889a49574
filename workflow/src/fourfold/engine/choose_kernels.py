"""Choosing tokens on a GPU: `sampling.choose` for all rows of logits, greedy and sampled ones, in three launches.

The vocabulary is split among programs. The first launch finds each part's maximum, the second the highest score of each
part with its noise (none is needed where all requests are greedy), the third the token. Logits are read as the output
matrix gives them. The reference is `sampling.choose`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.engine.sampling import SamplingBatch
from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous
from fourfold.modeling.noise_kernels import gumbel, noise_key, rough_gumbel

BLOCK = 2048
"""Tokens of a part."""
NONE = tl.constexpr(2**31 - 1)
"""Beyond all tokens and parts."""
NEAR = tl.constexpr(1e-3)
"""Rough scores that differ by less are compared exactly; for large scores, whose digits are coarser, a millionth."""
MOST = tl.constexpr(1e30)
"""A large score that a millionth of makes sense for."""


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


@triton.jit(do_not_specialize=["nodes", "depth_stride"], do_not_specialize_on_alignment=["depths"])
def _draws(
    logits: tl.tensor,
    maxima: tl.tensor,
    scores: tl.tensor,
    drawn: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    generated: tl.tensor,
    greedy: tl.tensor,
    depths: tl.tensor,
    row_nodes: tl.tensor,
    vocab: tl.tensor,
    nodes: tl.tensor,
    depth_stride: tl.tensor,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The highest score of one part of one row, and its token. A score is logit / temperature + noise, in float64.

    In float32 it is known which token has it, but for one part in a thousand: the others need no exact score.
    """
    row, part, each = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE)
    token = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous()
    let_next_start()
    node = _node(row_nodes, row)
    request = node // nodes
    if _is_drawn(temperatures, greedy, request):
        temperature, min_p = tl.load(temperatures + request), tl.load(min_ps + request)
        index = tl.load(generated + request)
        if depths is not None:
            index += tl.load(depths + request * depth_stride + node % nodes)
        top = tl.max(tl.load(maxima + row * PARTS + each, mask=each < PARTS, other=float("-inf")))
        place, there = logits + row.to(tl.int64) * vocab + token, token < vocab
        value = tl.load(place, mask=there, other=float("-inf")).to(tl.float32)
        key = noise_key(tl.load(seeds + request), index)
        scaled = value / temperature
        rough = scaled + rough_gumbel(key, token)
        if min_p > 0:
            rough = tl.where(tl.exp((value - top) / temperature) >= min_p, rough, float("-inf"))
        most = tl.max(rough)
        near = (rough >= most - NEAR - tl.minimum(tl.abs(most), MOST) * 1e-6) & (rough > float("-inf"))
        if tl.sum(near.to(tl.int32)) <= 1:
            # Some token where none is left, which is never the best of all parts.
            found = tl.min(tl.where(near, token, vocab - 1))
            best = tl.max(tl.where(near, scaled, float("-inf"))).to(tl.float64) + gumbel(key, found)
        else:
            score = tl.where(near, scaled.to(tl.float64) + gumbel(key, token), float("-inf"))
            best = tl.max(score)
            found = tl.min(tl.where(score == best, token, NONE))
        tl.store(scores + row * PARTS + part, best)
        tl.store(drawn + row * PARTS + part, found)


@triton.jit
def _node(row_nodes: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Which node of which request a row is."""
    return row if row_nodes is None else tl.load(row_nodes + row)


@triton.jit
def _is_drawn(temperatures: tl.tensor, greedy: tl.tensor, request: tl.tensor) -> tl.tensor:
    drawn = tl.load(temperatures + request) > 0
    if greedy is not None:
        drawn = drawn & (tl.load(greedy + request) == 0)
    return drawn


@triton.jit(do_not_specialize=["nodes"])
def _pick(
    maxima: tl.tensor,
    firsts: tl.tensor,
    scores: tl.tensor,
    drawn: tl.tensor,
    temperatures: tl.tensor,
    greedy: tl.tensor,
    row_nodes: tl.tensor,
    out: tl.tensor,
    nodes: tl.tensor,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """The token of one row."""
    row, each = tl.program_id(0), tl.arange(0, WIDE)
    there = each < PARTS
    wait_for_previous()
    let_next_start()
    maximum = tl.load(maxima + row * PARTS + each, mask=there, other=float("-inf"))
    first = tl.load(firsts + row * PARTS + each, mask=there, other=NONE)
    top, broken = tl.max(maximum), tl.min(first) < 0
    token = tl.min(tl.where(maximum == top, first, NONE))
    if scores is not None:  # noqa: SIM102  # decided when the kernel is compiled, the other one when it runs
        if _is_drawn(temperatures, greedy, _node(row_nodes, row) // nodes):
            score = tl.load(scores + row * PARTS + each, mask=there, other=float("-inf"))
            found = tl.load(drawn + row * PARTS + each, mask=there, other=NONE)
            token = tl.min(tl.where(score == tl.max(score), found, NONE))
            # An infinite logit leaves no distribution.
            broken = broken | (tl.abs(top) == float("inf"))
    tl.store(out + row, tl.where(broken, -1, token).to(tl.int64))


def choose_nodes(
    logits: Tensor,
    batch: SamplingBatch,
    index: Tensor,
    depths: Tensor | None = None,
    row_nodes: Tensor | None = None,
) -> Tensor:
    """The next token at each node of each request's draft; what `sampling.choose` chooses, without top_k and top_p.

    Args:
        logits: [rows, vocab], in any floating dtype.
        batch: sampling parameters, a row for each request.
        index: int64 [batch], how many tokens each has generated.
        depths: int64 [batch, nodes], how many more there are at each node; the last dimension contiguous. None: none,
            and each request has a row.
        row_nodes: int64 [rows], contiguous: which of `depths`, flattened, is each row's; None: rows are batch * nodes
            in their order.
    Returns int64 [rows]; -1 where `sampling.choose` gives it.
    """
    (rows, vocab), nodes = logits.shape, 1 if depths is None else depths.shape[1]
    parts, logits = triton.cdiv(vocab, BLOCK), logits.contiguous()
    device = logits.device
    maxima = torch.empty(rows, parts, dtype=torch.float32, device=device)
    firsts = torch.empty(rows, parts, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    sizes: dict[str, Any] = {"PARTS": parts, "WIDE": triton.next_power_of_2(parts)}
    _maxima[(rows, parts)](logits, maxima, firsts, vocab, PARTS=parts, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    scores = drawn = None
    if batch.has_sampled:
        scores, drawn = torch.empty_like(maxima, dtype=torch.float64), torch.empty_like(firsts)
        _draws[(rows, parts)](
            logits,
            maxima,
            scores,
            drawn,
            batch.temperature,
            batch.min_p,
            batch.seed,
            index,
            batch.greedy,
            depths,
            row_nodes,
            vocab,
            nodes,
            0 if depths is None else depths.stride(0),
            **sizes,
            BLOCK=BLOCK,
            num_warps=4,
            **OPTIONS,
        )
    _pick[(rows,)](
        maxima,
        firsts,
        scores,
        drawn,
        batch.temperature,
        batch.greedy,
        row_nodes,
        out,
        nodes,
        **sizes,
        num_warps=1,
        **OPTIONS,
    )
    return out
