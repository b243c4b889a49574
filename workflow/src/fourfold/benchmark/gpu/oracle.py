"""Acceptance held at a chosen length: drafts are kept as often as a seeded schedule says.

The drafter runs and costs what it costs, and so does the verification. What the target chose is then replaced, inside
the captured step, so that a sequence keeps as many drafts as its schedule has at that place. The text is then partly
the drafter's own, which nobody reads; how much was accepted is measured.
"""

import torch
from torch import Tensor

from fourfold.engine import LLMEngine
from fourfold.engine.sampling import SamplingBatch
from fourfold.errors import FourfoldError


class Oracle:
    """Decides how many of an engine's drafts are kept. A request's seed is its row: 0 to sequences - 1.

    What it holds changes between steps, without capturing them anew; at first no draft is kept.
    """

    def __init__(self, engine: LLMEngine, sequences: int, length: int) -> None:
        """Args: an engine that drafts single beams on a GPU, before its first step; rows; tokens of an answer.

        Raises FourfoldError for an engine that captures no steps.
        """
        if engine.decoder.graphs is None:
            raise FourfoldError("acceptance can be held on a GPU only: on a CPU no step is captured")
        self._vocab_size = engine.target.config.vocab_size
        self._kept = torch.zeros(sequences, length, dtype=torch.int64, device=engine.target.device)
        engine.decoder.graphs.replace_chosen = self

    def __call__(self, tokens: Tensor, chosen: Tensor, batch: SamplingBatch, index: Tensor) -> Tensor:
        """What is to count as chosen after each node: int64 [batch, nodes]. Arguments as in `graphs.body`."""
        drafts, found = tokens[:, 1:], chosen[:, :-1]
        place = torch.arange(drafts.shape[1], device=index.device)
        # What fills up the batch has any index; its drafts do not matter.
        kept = self._kept[batch.seed, index.clamp(max=self._kept.shape[1] - 1)][:, None]
        other = torch.where(found == drafts, (found + 1) % self._vocab_size, found)
        return torch.cat((torch.where(place < kept, drafts, other), chosen[:, -1:]), 1)

    def hold(self, acceptance_length: float, seed: int = 0) -> None:
        """Keeps `acceptance_length` - 1 drafts on the average: one of the two nearest whole numbers."""
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(self._kept.shape, generator=generator)
        kept = acceptance_length - 1
        self._kept.copy_(int(kept) + (chance < kept - int(kept)).long())
