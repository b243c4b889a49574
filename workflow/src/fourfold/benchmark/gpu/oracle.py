"""Acceptance held at a chosen length, by drafts that are right as often as a seeded schedule says.

The drafter runs and costs what it costs; its tokens are then replaced, inside the captured step, by the sequence's own
known continuation for a few positions and by a wrong token from there on. The continuation was recorded by steps of the
same size: their products sum in the same order, so that near ties fall the same way. How much was accepted is measured.
"""

from dataclasses import replace

import torch

from fourfold.engine import LLMEngine
from fourfold.engine.draft_tree import DraftTree
from fourfold.engine.sampling import SamplingBatch
from fourfold.errors import FourfoldError


class Oracle:
    """Replaces an engine's drafts. A request's seed is its row: 0 to sequences - 1.

    What it does changes between steps, without capturing them anew; at first no draft is right.
    """

    def __init__(self, engine: LLMEngine, sequences: int, length: int) -> None:
        """Args: an engine that drafts single beams on a GPU, before its first step; rows; tokens of an answer.

        Raises FourfoldError for an engine that captures no steps.
        """
        if engine._graphs is None:
            raise FourfoldError("acceptance can be held on a GPU only: on a CPU no step is captured")
        device = engine.target.device
        self._vocab_size = engine.target.config.vocab_size
        self._known = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        self._right = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        engine._graphs.replace_drafts = self

    def __call__(self, tree: DraftTree, batch: SamplingBatch, index: torch.Tensor) -> DraftTree:
        """The tree with other drafts. Args: index int64 [batch], tokens generated so far; see `graphs.body`."""
        place = torch.arange(tree.tokens.shape[1] - 1, device=index.device)
        # What fills up the batch has any index; its drafts do not matter.
        at = (index[:, None] + place).clamp_(max=self._known.shape[1] - 1)
        row = batch.seed[:, None]
        known = self._known[row, at]
        right = place < self._right[row, at[:, :1]]
        drafts = torch.where(right, known, (known + 1) % self._vocab_size)
        return replace(tree, tokens=torch.cat((tree.tokens[:, :1], drafts), 1))

    def learn(self, answers: list[list[int]]) -> None:
        """Takes the answers' tokens, by row, for what is right."""
        for row, answer in enumerate(answers):
            count = min(len(answer), self._known.shape[1])
            self._known[row, :count] = torch.tensor(answer[:count], device=self._known.device)

    def hold(self, acceptance_length: float, seed: int = 0) -> None:
        """Drafts `acceptance_length` - 1 right tokens on the average: one of the two nearest whole numbers."""
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(self._right.shape, generator=generator)
        kept = acceptance_length - 1
        self._right.copy_(int(kept) + (chance < kept - int(kept)).long())
