"""Choosing drafts on a GPU: the best tokens of each depth.

The logits are split among programs, each of which finds its best tokens; the kernel after them merges these. The
reference is `draft_trunk`. With NaN among the logits, what is chosen is still a token, though perhaps one twice.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.kernels import load_sum
from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous
from fourfold.modeling.noise import DraftNoise
from fourfold.modeling.noise_kernels import noise_key, rough_gumbel

CANDIDATES = 512
"""Logits among which a program finds the best."""


@dataclass
class Candidates:
    """The target's tokens among which each row's most likely ones are."""

    tokens: Tensor
    """int64 [rows, n]."""
    scores: Tensor | None = None
    """float32 [rows, n]; None where n is 1."""
    masses: Tensor | None = None
    """float32 [rows, n]: for how many tokens of the same score each stands, so that all together have the probability
    of the whole vocabulary. None where no probabilities are wanted."""


@dataclass
class Drafted:
    """The best candidates of each depth, best first. Depth 0 has the newest token as its first, and no others."""

    tokens: Tensor
    """int64 [rows, 1 + drafts, width]."""
    log_p: Tensor | None
    """float32 of that shape: the logarithm of the probability of each candidate's path. None where width is 1."""

    @classmethod
    def empty(cls, rows: int, drafts: int, width: int, device: torch.device) -> "Drafted":
        """Room for a draft."""
        tokens = torch.empty(rows, 1 + drafts, width, dtype=torch.int64, device=device)
        return cls(tokens, torch.empty_like(tokens, dtype=torch.float32) if width > 1 else None)


@triton.jit(do_not_specialize=["depth"])
def _candidates(
    product: tl.tensor,
    draft_to_target: tl.tensor,
    seeds: tl.tensor,
    generated: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    scores: tl.tensor,
    masses: tl.tensor,
    depth: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    there, place = column < size, (row * tl.num_programs(1) + block) * WIDTH
    wait_for_previous()
    let_next_start()
    value = load_sum(product, row * size + column, there, tl.num_programs(0) * size, PARTS)
    if weights is not None:
        weight = tl.load(weights + row)
        if weight != 0:
            key = noise_key(tl.load(seeds + row), tl.load(generated + row) + depth)
            token = column.to(tl.int64)
            if draft_to_target is not None:
                token = tl.load(draft_to_target + column, mask=there, other=0)
            # A draft is a guess.
            value += rough_gumbel(key, token) * weight
    value = tl.where(there, value, float("-inf"))
    mass = 1.0
    if WIDTH > 1:
        mass = tl.sum(tl.exp(value - tl.max(value)))
    for rank in tl.static_range(WIDTH):
        best = tl.max(value)
        # No score may be the highest where there are NaN among them; what is chosen must be a token all the same.
        choice = tl.min(tl.where((value == best) & there, column, size - 1))
        tl.store(scores + place + rank, best)
        tl.store(tokens + place + rank, choice if draft_to_target is None else tl.load(draft_to_target + choice))
        if WIDTH > 1:
            tl.store(masses + place + rank, mass if rank == 0 else 0.0)
            value = tl.where(column == choice, float("-inf"), value)


def best_logits(
    product: Tensor, draft_to_target: Tensor | None, width: int = 1, noise: DraftNoise | None = None, depth: int = 0
) -> Candidates:
    """The most likely tokens of each CANDIDATES.

    Args:
        product: partial, [parts, rows, logits].
        draft_to_target: int64 [logits], the target's token of each logit; None where they are the same.
        width: how many of each; above 1, with masses.
        noise: what is added to the logits; each of its tensors contiguous.
        depth: drafts before this one.
    """
    parts, rows, size = product.shape
    blocks = triton.cdiv(size, CANDIDATES)
    tokens = torch.empty(rows, blocks * width, dtype=torch.int64, device=product.device)
    scores = torch.empty_like(tokens, dtype=torch.float32)
    masses = torch.empty_like(scores) if width > 1 else None
    _candidates[(rows, blocks)](
        product,
        draft_to_target,
        *((None, None, None) if noise is None else (noise.seed, noise.index, noise.weight)),
        tokens,
        scores,
        masses,
        depth,
        size,
        PARTS=parts,
        WIDTH=width,
        BLOCK=CANDIDATES,
        num_warps=4,
        **OPTIONS,
    )
    return Candidates(tokens, scores, masses)


@triton.jit
def choose(
    tokens: tl.tensor,
    scores: tl.tensor,
    masses: tl.tensor,
    drafted: tl.tensor,
    log_p: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    steps: tl.tensor,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Stores a program's WIDTH best tokens, of equal ones the first, as those of depth `step`, and returns the best."""
    row, at = tl.program_id(0), tl.arange(0, COUNT)
    start, place = row * count, (row * steps + step) * WIDTH
    if scores is None:
        best_token = tl.load(tokens + row)
        tl.store(drafted + place, best_token)
        if log_p is not None:
            tl.store(log_p + place, 0.0)
    else:
        value = tl.load(scores + start + at, mask=at < count, other=float("-inf"))
        best = tl.max(value)
        choice = tl.min(tl.where(value == best, at, count - 1))
        best_token = tl.load(tokens + start + choice)
        tl.store(drafted + place, best_token)
        if log_p is not None:
            mass = tl.load(masses + start + at, mask=at < count, other=0.0)
            whole = best + tl.log(tl.sum(mass * tl.exp(value - best)))
            trunk = tl.load(log_p + place - WIDTH)
            tl.store(log_p + place, trunk + _below_zero(best - whole))
            for rank in tl.static_range(1, WIDTH):
                value = tl.where(at == choice, float("-inf"), value)
                best = tl.max(value)
                choice = tl.min(tl.where(value == best, at, count - 1))
                tl.store(drafted + place + rank, tl.load(tokens + start + choice))
                tl.store(log_p + place + rank, trunk + _below_zero(best - whole))
    return best_token


@triton.jit
def _below_zero(log_p: tl.tensor) -> tl.tensor:
    """0 for NaN, and for what rounding left above 0: a path may not be likelier than a part of it."""
    return tl.where(log_p < 0, log_p, 0.0)
