"""Decodes the running sequences together, one step at a time: draft, verify, keep.

On a CPU a step's operations are launched one by one. On a GPU they are replayed as CUDA graphs (`engine.graphs`), and
the next step is launched before this one's tokens are read, so that the GPU need not wait for the host.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.slots import Slots
from fourfold.engine.speculative import draft, verify
from fourfold.engine.tell import tell
from fourfold.modeling.beams import Beams, keep_beam
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer

if TYPE_CHECKING:
    from fourfold.engine.graphs import DecodeGraphs, LaunchedStep


class Decoder:
    """One step after the other for the sequences that run in an engine's slots.

    Who changes which sequences run, or how much is drafted, has to `catch_up` before and call `running_changed` after.
    """

    def __init__(
        self,
        target: Transformer,
        drafter: Redrafter | None,
        slots: Slots,
        plan: DraftPlan,
        graphs: "DecodeGraphs | None",
    ) -> None:
        """Takes no memory.

        Args:
            target, drafter: the models; without a drafter the plan drafts nothing.
            slots: where sequences run.
            plan: how much is drafted.
            graphs: the captured steps, on a GPU.
        """
        self.target, self.drafter, self.slots, self.plan, self.graphs = target, drafter, slots, plan, graphs
        self._batch: SamplingBatch | None = None
        self._ahead: LaunchedStep | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether a step has been launched whose tokens are not known yet."""
        return self._ahead is not None

    def running_changed(self) -> None:
        """Takes up the running sequences anew before the next step."""
        self._batch = None

    def forget(self) -> None:
        """Drops a step that failed, and one that was launched ahead: the sequences are as they were before."""
        self._ahead, self._batch, self.slots.lanes = None, None, 1

    def catch_up(self) -> list[Sequence]:
        """Gives the sequences the tokens of a step that was launched ahead; returns those that ended with it."""
        step, self._ahead = self._ahead, None
        return [] if step is None else self._collect(step)

    def step(self, run_ahead: bool) -> list[Sequence]:
        """Decodes once for every running sequence; returns those that ended.

        run_ahead: whether the sequences may decode once more before this step's tokens are known.
        """
        running = self.slots.running
        changed = self._batch is None
        if self._batch is None:
            self._batch = SamplingBatch.of([sequence.params for sequence in running], self.target.device)
        shape = self.plan.shape(len(running))
        if self.graphs is not None:
            if changed:
                self.graphs.load(running, self._batch)
            return self._replay(self.graphs, shape, run_ahead)
        index = self._tensor([len(sequence.output.token_ids) for sequence in running])
        last = self._tensor([sequence.last_token for sequence in running])
        # The newest token is not in the cache yet: its position is the number of tokens before it.
        start = self._tensor([sequence.length - 1 for sequence in running])
        if self.drafter is None or shape == NO_DRAFTS:
            return self._plain(self._batch, index, last, start)
        return self._drafted(self.drafter, self._batch, shape, index, last, start)

    def _plain(self, batch: SamplingBatch, index: Tensor, last: Tensor, start: Tensor) -> list[Sequence]:
        """A step without drafts.

        Args: index, last, start: int64 [running], tokens generated so far, the newest token and its position.
        """
        running = self.slots.running
        self.slots.lanes = 1
        hidden = self._forward(last[:, None], start[:, None], 1)
        self.slots.hidden[: len(running)] = hidden[:, 0]
        logits = self.target.logits(hidden[:, 0])
        tokens = [[token] for token in choose(logits, batch, index).tolist()]
        tell(running, logits, tokens)
        return self._append(tokens)

    def _drafted(
        self, drafter: Redrafter, batch: SamplingBatch, shape: DraftShape, index: Tensor, last: Tensor, start: Tensor
    ) -> list[Sequence]:
        """A step that verifies drafts. Arguments as of `_plain`."""
        slots, running = self.slots, self.slots.running
        tree = draft(drafter, self.target, slots.hidden[: len(running)], last, shape, batch.draft_noise(index))
        beams = slots.open_lanes(tree)
        hidden = self._forward(tree.tokens, start[:, None] + tree.offsets, tree.beam_length, beams)
        logits = self.target.logits(hidden)
        node, following = verify(logits, tree, batch, index)
        beam = tree.beam_of(node)
        if slots.lanes > 1:
            keep_beam(slots.cache, slots.lanes, start, tree.beam_length, beam)
        row = torch.arange(len(running), device=node.device)
        slots.hidden[: len(running)] = hidden[row, node]
        drafted = tree.tokens.gather(1, tree.paths[row, beam])
        kept = tree.depths[row, node].tolist()
        rows = zip(drafted.tolist(), kept, following.tolist(), strict=True)
        tokens = [[*path[1 : number + 1], token] for path, number, token in rows]
        tell(running, logits.flatten(0, 1), tokens, tree.paths[row, beam] + row[:, None] * logits.shape[1])
        for sequence, number, size in zip(running, kept, tree.sizes.tolist(), strict=True):
            sequence.count(number, size, tree.beam_length)
        return self._append(tokens)

    def _replay(self, graphs: "DecodeGraphs", shape: DraftShape, run_ahead: bool) -> list[Sequence]:
        """A captured step.

        When a sequence ends, what the step that was launched ahead has for the others is read too: their slots change.
        """
        running = len(self.slots.running)
        # What fills up the batch writes to slots beyond the running ones.
        self.slots.take(graphs.slots(running))
        step = self._ahead or graphs.launch(running, shape)
        # The next step overwrites the logits.
        silent = all(sequence.params.logprobs is None for sequence in self.slots.running)
        self._ahead = graphs.launch(running, shape) if run_ahead and silent else None
        ended = self._collect(step)
        if len(ended) == running:
            self._ahead = None
        return [*ended, *self.catch_up()] if ended else []

    def _collect(self, step: "LaunchedStep") -> list[Sequence]:
        """Gives running sequences the tokens of a captured step; returns those that ended with it."""
        tokens, running = step.tokens(), self.slots.running
        tell(running, step.logits, tokens, step.rows())
        if step.shape != NO_DRAFTS:
            for sequence, new, drafts in zip(running, tokens, step.drafts(), strict=True):
                sequence.count(len(new) - 1, drafts, step.shape.beam_length)
        return self._append(tokens)

    def _forward(self, tokens: Tensor, positions: Tensor, ahead: int, beams: Beams | None = None) -> Tensor:
        """Runs new tokens of all running sequences, which reach `ahead` positions from the newest token on."""
        running = self.slots.running
        length = max(sequence.length for sequence in running) - 1 + ahead
        slots = len(running) * (1 if beams is None else beams.width)
        return self.target.forward(tokens, positions, self.slots.cache.slots(0, slots), length, beams)

    def _append(self, tokens: list[list[int]]) -> list[Sequence]:
        """Gives each running sequence its new tokens, up to where it ends; returns those that ended with them."""
        return [
            sequence
            for sequence, new in zip(self.slots.running, tokens, strict=True)
            if sequence.output.finish_reason is None and any(sequence.append(token) for token in new)
        ]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.target.device)
