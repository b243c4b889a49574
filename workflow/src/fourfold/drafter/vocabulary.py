"""The draft vocabulary: the tokens that a drafter can propose (as in FR-Spec, arXiv 2502.14856)."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fourfold.errors import FourfoldError


def choose_draft_vocabulary(
    answers: Iterable[Sequence[int]], size: int, vocab_size: int, always: Sequence[int]
) -> Tensor:
    """The most frequent tokens of the answers.

    Args:
        answers: token ids of each answer.
        size: how many tokens to choose.
        vocab_size: the target's vocabulary.
        always: tokens that are in it whatever their count: the end-of-text tokens.
    Returns int64 [size], ascending. Ties go to the lower id; if the answers have fewer different tokens, the lowest
    other ids fill up. Raises FourfoldError when `size` is too large or too small.
    """
    if size > vocab_size:
        raise FourfoldError(f"drafter.shape.draft_vocab_size: {size} exceeds the model's vocabulary of {vocab_size}")
    if size < len(always):
        raise FourfoldError(f"drafter.shape.draft_vocab_size: {size} has no room for {len(always)} end-of-text tokens")
    counts: Counter[int] = Counter()
    for answer in answers:
        counts.update(answer)
    chosen = dict.fromkeys(always)
    by_count = sorted(counts, key=lambda token: (-counts[token], token))
    for token in (*by_count, *range(vocab_size)):
        if len(chosen) == size:
            break
        chosen[token] = None
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def invert(draft_to_target: Tensor | None, vocab_size: int) -> Tensor:
    """int64 [vocab_size]: the logit of each of the target's tokens, -1 for those that cannot be drafted."""
    if draft_to_target is None:
        return torch.arange(vocab_size)
    target_to_draft = torch.full((vocab_size,), -1, dtype=torch.int64)
    target_to_draft[draft_to_target.cpu()] = torch.arange(draft_to_target.numel())
    return target_to_draft
