"""How likely tokens are: what a client asks for to score a text, or to see what else could have been said.

Probabilities are the model's own: before temperature and filters, as in vLLM (`logprobs_mode` raw_logprobs).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64
"""Rows of logits in one piece: bounds the memory that a long prompt takes."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token at its place, and the most likely ones there. Logarithms are natural."""

    token: int
    logprob: float | None
    """None for the first token of a prompt: nothing predicts it."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob), most likely first."""


def token_logprobs(logits: Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
    """How likely each token was.

    Args:
        logits: [tokens, vocab], those that each token was chosen from.
        tokens: one for each row.
        top: how many of the most likely tokens to tell.
    """
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, choices = log_p.topk(min(top, logits.shape[-1]), -1)
    best = [
        tuple(zip(row, row_values, strict=True))
        for row, row_values in zip(choices.tolist(), values.tolist(), strict=True)
    ]
    return [TokenLogprob(*of_token) for of_token in zip(tokens, own, best, strict=True)]
