"""The target's side of training: hidden states at the answers' positions, computed once and kept where they fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.drafter.samples import Text
from fourfold.modeling.transformer import Transformer

KEEP_BYTES = 2 * 2**30
"""Batches that a process keeps for later epochs; groups beyond it are computed anew in each."""
TOGETHER = 32768
"""Tokens, padding among them, that a GPU reads at once: one group takes it no time, but as many launches."""
GRAPH_ROWS = 256
"""On a GPU the rows of a batch are filled up to a multiple of this, so that few numbers of rows are to be captured."""


@dataclass(frozen=True)
class Batch:
    """Positions of a group of texts, one row each, text after text.

    Row r is a position whose next token is an answer's: the last prompt token and every answer token but the last.
    Where a text goes on, row r + 1 is the next position, so the i-th label of a draft from row r is tokens[r + 1 + i].
    """

    hidden: Tensor
    """[rows, hidden_size]: the target's last hidden state, in its dtype."""
    tokens: Tensor
    """int64 [rows]: the token that follows the position."""
    remaining: Tensor
    """int64 [rows]: how many rows of the same text come after it: the labels that a draft from here has."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.hidden.nbytes + self.tokens.nbytes + self.remaining.nbytes

    def padded(self, multiple: int) -> "Batch":
        """Filled up to a multiple of rows; those that are added start no draft and are no draft's label."""
        extra = -len(self.tokens) % multiple
        return Batch(
            F.pad(self.hidden, (0, 0, 0, extra)), F.pad(self.tokens, (0, extra)), F.pad(self.remaining, (0, extra))
        )


def answer_tokens(texts: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor]:
    """`tokens` and `remaining` of a batch."""
    tokens = [token for text in texts for token in text.token_ids]
    remaining = [left for text in texts for left in range(len(text.token_ids) - 1, -1, -1)]
    return torch.tensor(tokens, device=device), torch.tensor(remaining, device=device)


def answer_states(target: Transformer, texts: Sequence[Text]) -> Tensor:
    """Hidden states of a batch, by one forward pass over the texts, padded on the right.

    Returns [rows, hidden_size]: of each text the last prompt position and all answer positions but the last.
    """
    width = max(text.length for text in texts) - 1
    token_ids = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        known = (*text.prompt_token_ids, *text.token_ids)[:-1]
        token_ids[row, : len(known)] = torch.tensor(known)
    hidden = target.hidden_states(token_ids.to(target.device))
    rows = [
        hidden[i, len(text.prompt_token_ids) - 1 : text.length - 1] for i, text in enumerate(texts)
    ]  # each [len(answer), hidden_size]
    return torch.cat(rows)


class TargetStates:
    """Batches of fixed groups of texts, with the frozen target's hidden states, on the target's device.

    They are kept up to `keep_bytes`; a group computed again has the same bits on a CPU.
    """

    def __init__(self, target: Transformer, groups: Sequence[Sequence[Text]], keep_bytes: int = KEEP_BYTES) -> None:
        self.target, self.groups, self.keep_bytes = target, groups, keep_bytes
        on_gpu = target.device.type == "cuda"
        self.multiple, self.together = (GRAPH_ROWS, TOGETHER) if on_gpu else (1, 0)
        self._kept: dict[int, Batch] = {}
        self._kept_bytes = 0

    def batch(self, group: int) -> Batch:
        """The batch of a group."""
        if (kept := self._kept.get(group)) is not None:
            return kept
        numbers = self._neighbours(group)
        states = answer_states(self.target, [text for number in numbers for text in self.groups[number]])
        rows = [sum(len(text.token_ids) for text in self.groups[number]) for number in numbers]
        for number, hidden in zip(numbers, states.split(rows), strict=True):
            made = Batch(hidden.clone(), *answer_tokens(self.groups[number], self.target.device)).padded(self.multiple)
            if number == group:
                wanted = made
            if self._kept_bytes + made.nbytes <= self.keep_bytes:
                self._kept[number] = made
                self._kept_bytes += made.nbytes
        return wanted

    def _neighbours(self, group: int) -> list[int]:
        """The group and those after it, whose texts are about as long, that are computed with it because they are kept.

        When the bound is reached none is computed for nothing.
        """
        numbers, texts, kept = [group], len(self.groups[group]), self._kept_bytes
        size = self.target.config.hidden_size * self.target.dtype.itemsize
        for number in range(group + 1, len(self.groups)):
            texts += len(self.groups[number])
            width = max(text.length for text in self.groups[number])
            kept += sum(len(text.token_ids) for text in self.groups[number]) * size
            if number in self._kept or texts * width > self.together or kept > self.keep_bytes:
                break
            numbers.append(number)
        return numbers
