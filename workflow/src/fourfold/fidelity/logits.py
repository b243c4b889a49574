"""Logits error: how far one model's next-token distributions are from another's at the same positions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

CHUNK = 128
"""Positions whose logits are in memory at once, twice, in float64: 100 MB for a vocabulary of 49,152."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class LogitsError:
    """Errors by position of one text, on the CPU."""

    kl: Tensor
    """float64 [positions]: KL(reference || other), nats."""
    top1: Tensor
    """bool [positions]: both have the same most likely token."""
    difference: Tensor
    """float64 [positions]: the largest absolute difference of two logits of the same token."""


def compare(reference: Tensor, other: Tensor) -> LogitsError:
    """Compares logits [positions, vocab] of the same positions.

    KL(p || q) = sum p (log p - log q) over the vocabulary, in float64: at a few thousandths of a nat the terms cancel
    nearly all of float32's digits.
    """
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    top1 = reference.argmax(-1) == other.argmax(-1)
    difference = (reference.double() - other.double()).abs().amax(-1)
    return LogitsError(kl.cpu(), top1.cpu(), difference.cpu())


def compare_states(
    reference: Tensor, other: Tensor, heads: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
) -> LogitsError:
    """Compares the logits that two models' `heads` make of their hidden states [positions, hidden], chunk by chunk."""
    parts = [compare(heads[0](a), heads[1](b)) for a, b in zip(reference.split(CHUNK), other.split(CHUNK), strict=True)]
    return LogitsError(*(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "top1", "difference")))


def text_row(error: LogitsError) -> dict[str, Any]:
    """Figures of one text: nats a token, shares from 0 to 1, logits."""
    return {
        "tokens": len(error.kl),
        "kl": float(error.kl.mean()),
        "kl_max": float(error.kl.max()),
        "top1_agreement": float(error.top1.double().mean()),
        "max_logit_difference": float(error.difference.max()),
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all texts: means over tokens, and the mean KL's 95 % interval with texts as clusters.

    The interval is Student's, with a text's tokens as one cluster (Miller, arXiv 2411.00640, section 2.2):
    SE^2 = T / (T - 1) * sum over the T texts (tokens * (kl - mean))^2 / (all tokens)^2.
    """
    tokens = sum(row["tokens"] for row in rows)
    mean = math.fsum(row["tokens"] * row["kl"] for row in rows) / tokens
    texts = len(rows)
    squares = math.fsum((row["tokens"] * (row["kl"] - mean)) ** 2 for row in rows)
    error = math.sqrt(squares * texts / (texts - 1)) / tokens if texts > 1 else math.inf
    half = float(stdtrit(texts - 1, (1 + CONFIDENCE) / 2)) * error if texts > 1 else math.inf
    return {
        "texts": texts,
        "tokens": tokens,
        "kl": mean,
        # A divergence is never negative, whatever a symmetric interval says.
        "kl_low": max(0.0, mean - half),
        "kl_high": mean + half,
        "kl_max": max(row["kl_max"] for row in rows),
        "top1_agreement": math.fsum(row["tokens"] * row["top1_agreement"] for row in rows) / tokens,
        "max_logit_difference": max(row["max_logit_difference"] for row in rows),
    }
