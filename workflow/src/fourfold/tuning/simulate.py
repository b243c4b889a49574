"""What a draft shape would yield: verification keeps what plain decoding writes, so known answers tell it exactly.

No token is generated: the target reads its own held-out answers once, the drafter drafts at every position of them,
and decoding is replayed on what it drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.drafter.samples import Text
from fourfold.drafter.states import answer_states, answer_tokens
from fourfold.engine.draft_plan import NO_DRAFTS, DraftShape
from fourfold.engine.draft_tree import DraftTree
from fourfold.engine.speculative import draft
from fourfold.engine.trunk_tree import draft_trunk
from fourfold.modeling.noise import DRAFT_WEIGHT, DraftNoise
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.modeling.trunk_tree import TrunkTree

ROWS = 128
"""Positions at which is drafted at once: bounds the memory of the drafter's scores."""


@dataclass
class Answers:
    """Known answers, one position a row, text after text."""

    hidden: Tensor
    """[rows, hidden_size]: the target's state that predicted the row's token."""
    tokens: Tensor
    """int64 [rows]."""
    remaining: Tensor
    """int64 [rows]: rows of the same text after it."""
    noise: DraftNoise | None
    """With which the answers were drawn; None if they were not."""


def read_answers(target: Transformer, texts: Sequence[Text], temperature: float) -> Answers:
    """The target's states along answers, one text at a time. temperature: with which they were drawn."""
    hidden = torch.cat([answer_states(target, [text]) for text in texts])
    return Answers(hidden, *answer_tokens(texts, target.device), _noise(texts, temperature, target.device))


def _noise(texts: Sequence[Text], temperature: float, device: torch.device) -> DraftNoise | None:
    if temperature == 0 or any(text.seed is None for text in texts):
        return None
    # At the row of token i, the next one is the one of index i + 1.
    rows = [(text.seed, i + 1) for text in texts for i in range(len(text.token_ids))]
    seed, index = torch.tensor(rows, dtype=torch.int64, device=device).T
    return DraftNoise(seed, index, torch.full(seed.shape, temperature * DRAFT_WEIGHT, device=device))


@dataclass(frozen=True)
class Yield:
    """Means over the verifications of a replayed decoding."""

    tokens: float
    """Tokens that a verification yields, the target's own among them: the acceptance length."""
    drafts: float
    """Draft tokens that it verifies."""


@torch.inference_mode()
def simulate(
    drafter: Redrafter, target: Transformer, answers: Answers, shape: DraftShape, together: bool = False
) -> Yield:
    """Replays decoding of the answers with a draft shape.

    Args:
        drafter: packed, as an engine has it.
        target, answers, shape: what is drafted for, the known answers, and how.
        together: on a GPU, where the shape shares what is verified: among many positions, not for each one alone.
    """
    if shape == NO_DRAFTS:
        return Yield(tokens=1.0, drafts=0.0)
    accepted, sizes = [], []
    rows = len(answers.tokens)
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        noise = None if answers.noise is None else answers.noise.rows(part)
        hidden, last = answers.hidden[part], answers.tokens[part]
        tree: DraftTree | TrunkTree
        if target.device.type == "cpu":
            tree = draft(drafter, target, hidden, last, shape, noise)
            sizes.append(tree.sizes)
        else:
            drafts, most = shape.beam_length - 1, shape.most_nodes - 1 if together and shape.shares else None
            tree = draft_trunk(drafter, target, hidden, last, drafts, shape.beam_width, shape.nodes - 1, noise, most)
            sizes.append(tree.sizes)
        accepted.append(_accepted(tree, shape.beam_length, answers, start))
    return _replay(torch.cat(accepted).tolist(), torch.cat(sizes).tolist(), answers.remaining.tolist())


def _accepted(tree: DraftTree | TrunkTree, length: int, answers: Answers, start: int) -> Tensor:
    """How many drafts from each row agree with the answer: int64 [rows of the tree]."""
    row = torch.arange(start, start + len(tree.tokens), device=tree.tokens.device)
    node, count = torch.zeros_like(row), torch.zeros_like(row)
    alive = torch.ones_like(row, dtype=torch.bool)
    for depth in range(1, length):
        following = answers.tokens[(row + depth).clamp(max=len(answers.tokens) - 1)]
        child = (tree.tokens == following[:, None]) & (tree.depths == depth) & (tree.parents == node[:, None])
        alive = alive & child.any(1) & (answers.remaining[row] >= depth)
        node = torch.where(alive, child.long().argmax(1), node)
        count = count + alive
    return count


def _replay(accepted: list[int], sizes: list[int], remaining: list[int]) -> Yield:
    steps = drafts = tokens = row = 0
    while row < len(accepted):
        if remaining[row] == 0:
            row += 1  # the last token of a text: nothing follows it
            continue
        steps += 1
        drafts += sizes[row]
        # A verification yields one token more than it accepts, as far as the text goes.
        new = min(accepted[row] + 1, remaining[row])
        tokens += new
        row += new
    return Yield(tokens / max(1, steps), drafts / max(1, steps))
