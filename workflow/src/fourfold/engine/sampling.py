"""Choosing tokens: greedy, or from the distribution that temperature, min_p, top_k and top_p leave.

Random numbers are a function of (seed, index of the token): no generator has a state, so a request's tokens do not
depend on the batch, on the slot, on drafts or on what ran before, and a run can be resumed anywhere.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourfold.engine.requests import SamplingParams


@dataclass
class SamplingBatch:
    """Sampling parameters of a batch; each is a tensor [batch] on the engine's device."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    sampled_rows: Tensor
    """int64: rows with a temperature above 0."""
    has_sampled: bool
    has_greedy: bool
    has_top_p: bool
    has_top_k: bool
    has_min_p: bool
    greedy: Tensor | None = None
    """bool: rows that are greedy although `sampled_rows` are all rows, as in a CUDA graph, which must not depend on
    which rows are sampled. Their temperature is any number above 0. None: `sampled_rows` tells them apart."""

    @property
    def in_kernels(self) -> bool:
        """Whether tokens are chosen by a GPU's kernels, which have no top_k and top_p."""
        return self.seed.is_cuda and not (self.has_top_k or self.has_top_p)

    @classmethod
    def of(cls, params: list[SamplingParams], device: torch.device) -> "SamplingBatch":
        """Collects the parameters of requests, one a row."""
        sampled = [i for i, p in enumerate(params) if p.temperature > 0]

        def tensor(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            temperature=tensor([p.temperature for p in params]),
            top_p=tensor([p.top_p for p in params]),
            top_k=tensor([p.top_k for p in params], torch.int64),
            min_p=tensor([p.min_p for p in params]),
            seed=tensor([_signed(p.seed) for p in params], torch.int64),
            sampled_rows=tensor(sampled, torch.int64),
            has_sampled=bool(sampled),
            has_greedy=len(sampled) < len(params),
            has_top_p=any(p.top_p < 1 for p in params),
            has_top_k=any(p.top_k > 0 for p in params),
            has_min_p=any(p.min_p > 0 for p in params),
        )

    def sampled(self) -> "SamplingBatch":
        """The rows with a temperature above 0 alone."""
        rows = self.sampled_rows
        return SamplingBatch(
            self.temperature[rows],
            self.top_p[rows],
            self.top_k[rows],
            self.min_p[rows],
            self.seed[rows],
            torch.arange(len(rows), device=rows.device),
            self.has_sampled,
            False,
            self.has_top_p,
            self.has_top_k,
            self.has_min_p,
            self.greedy,
        )

    def repeat(self, count: int) -> "SamplingBatch":
        """Each row `count` times, one after the other."""
        rows = self.sampled_rows[:, None] * count + torch.arange(count, device=self.seed.device)
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        repeated = {name: getattr(self, name).repeat_interleave(count) for name in names}
        greedy = None if self.greedy is None else self.greedy.repeat_interleave(count)
        return replace(self, sampled_rows=rows.flatten(), greedy=greedy, **repeated)


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer, which is what tensors hold."""
    return (value + 2**63) % 2**64 - 2**63


def uniforms(seed: Tensor, index: Tensor) -> Tensor:
    """Random numbers in [0, 1), float64, from seeds and token indices (int64, broadcast together).

    splitmix64 (Steele, Lea, Flood 2014) over both in turn; int64 products wrap as they should.
    """
    state = _mix(seed + _signed(0x9E3779B97F4A7C15))
    state = _mix(state ^ _mix(index + _signed(0xD1B54A32D192ED03)))
    return ((state >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    # Shifts of int64 keep the sign: the mask makes them shifts of the bare bits.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def probabilities(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The distribution that a sampled request draws from.

    Args:
        logits: [batch, ..., vocab].
        batch: parameters, one row of logits each; every temperature above 0.
    Returns float32 of the same shape; sums to 1. Filters apply in the order min_p, top_k, top_p. A row of logits with
    NaN or an infinite one gives NaN.
    """

    def column(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (logits.ndim - 1))

    p = torch.softmax(logits.float() / column(batch.temperature), -1)
    if not (batch.has_min_p or batch.has_top_k or batch.has_top_p):
        return p
    if batch.has_min_p:
        p = p * (p >= column(batch.min_p) * p.amax(-1, keepdim=True))
    if batch.has_top_k or batch.has_top_p:
        ordered, tokens = p.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if batch.has_top_k:
            k = torch.where(batch.top_k > 0, batch.top_k, logits.shape[-1])
            keep &= torch.arange(logits.shape[-1], device=p.device) < column(k)
        if batch.has_top_p:
            ordered = ordered * keep
            total = ordered.sum(-1, keepdim=True)
            # A token stays when those before it have not yet reached top_p: the first always stays.
            keep &= ordered.cumsum(-1) - ordered < column(batch.top_p) * total
        p = torch.zeros_like(p).scatter_(-1, tokens, ordered * keep)
    return p / p.sum(-1, keepdim=True)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws by the inverse of the distribution function.

    Args: weights [..., n] not negative, any positive sum; uniform float64 [...] in [0, 1).
    Returns int64 [...]; never an index of weight 0.
    """
    cumulative = weights.double().cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def choose(logits: Tensor, batch: SamplingBatch, index: Tensor) -> Tensor:
    """The next token of each request: greedy or drawn.

    Args: logits [batch, vocab]; index int64 [batch], how many tokens each has generated.
    Returns int64 [batch]; -1 where there is nothing to choose from: a logit is NaN or, if sampled, infinite.
    """
    if batch.in_kernels:
        from fourfold.engine.choose_kernels import choose_nodes  # Triton is there where a GPU is

        return choose_nodes(logits[:, None], batch, index)[:, 0]
    # To argmax NaN is the largest.
    top, tokens = logits.max(-1)
    tokens = torch.where(top.isnan(), -1, tokens)
    if batch.has_sampled:
        rows = batch.sampled_rows
        chosen = batch.sampled()
        p = probabilities(logits[rows], chosen)
        drawn = torch.where(p[:, 0].isnan(), -1, draw(p, uniforms(chosen.seed, index[rows])))
        tokens[rows] = drawn if batch.greedy is None else torch.where(batch.greedy, tokens, drawn)
    return tokens
