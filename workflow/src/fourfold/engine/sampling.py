"""Choosing tokens: greedy, or from the distribution that temperature, min_p, top_k and top_p leave.

A token is drawn by adding noise of its own to each log-probability and taking the highest (`modeling.noise`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourfold.engine.requests import SamplingParams
from fourfold.modeling.noise import DRAFT_WEIGHT, DraftNoise, gumbel, noise_keys, signed


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
            seed=tensor([signed(p.seed) for p in params], torch.int64),
            sampled_rows=tensor(sampled, torch.int64),
            has_sampled=bool(sampled),
            has_greedy=len(sampled) < len(params),
            has_top_p=any(p.top_p < 1 for p in params),
            has_top_k=any(p.top_k > 0 for p in params),
            has_min_p=any(p.min_p > 0 for p in params),
        )

    def draft_noise(self, index: Tensor) -> DraftNoise | None:
        """The noise of the next tokens to be drafted; None where all requests are greedy.

        index: int64 [batch], tokens that each has generated.
        """
        if not self.has_sampled:
            return None
        weight = self.temperature * DRAFT_WEIGHT
        return DraftNoise(self.seed, index, weight if self.greedy is None else weight.masked_fill(self.greedy, 0.0))

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

    def take(self, requests: Tensor) -> "SamplingBatch":
        """A batch whose rows are those of these requests, each as often as it is named. requests: int64 [rows]."""
        rows = torch.arange(len(requests), device=requests.device)
        greedy = None if self.greedy is None else self.greedy[requests]
        sampled = rows if greedy is not None else rows[torch.isin(requests, self.sampled_rows)]
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return replace(
            self, sampled_rows=sampled, greedy=greedy, **{name: getattr(self, name)[requests] for name in names}
        )


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


def draw(logits: Tensor, batch: SamplingBatch, index: Tensor) -> Tensor:
    """Draws a token for each request from what `probabilities` leaves.

    Args: logits [batch, vocab]; batch, every temperature above 0; index int64 [batch], tokens generated so far.
    Returns int64 [batch]; -1 for a row with NaN or an infinite logit, or without any finite one.
    """
    scores = logits.float() / batch.temperature[:, None]
    broken = ~scores.amax(-1).isfinite()  # to amax NaN is the largest
    if batch.has_min_p or batch.has_top_k or batch.has_top_p:
        scores = scores.masked_fill(probabilities(logits, batch) == 0, float("-inf"))
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    noise = gumbel(noise_keys(batch.seed, index)[:, None], tokens)
    return torch.where(broken, -1, noise.add_(scores).argmax(-1))


def choose(logits: Tensor, batch: SamplingBatch, index: Tensor) -> Tensor:
    """The next token of each request: greedy or drawn.

    Args: logits [batch, vocab]; index int64 [batch], how many tokens each has generated.
    Returns int64 [batch]; -1 where there is nothing to choose from: a logit is NaN or, if sampled, infinite.
    """
    if batch.in_kernels:
        from fourfold.engine.choose_kernels import choose_nodes  # Triton is there where a GPU is

        return choose_nodes(logits, batch, index)
    # To argmax NaN is the largest.
    top, tokens = logits.max(-1)
    tokens = torch.where(top.isnan(), -1, tokens)
    if batch.has_sampled:
        rows = batch.sampled_rows
        chosen = batch.sampled()
        drawn = draw(logits[rows], chosen, index[rows])
        tokens[rows] = drawn if batch.greedy is None else torch.where(batch.greedy, tokens, drawn)
    return tokens
