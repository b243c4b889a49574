"""Decoding steps on a GPU as CUDA graphs: one launch a step, where launching its kernels one by one takes longer.

A step is captured once for each number of sequences (rounded up), draft and kind of sampling: draft, verify, choose,
and the newest tokens, positions and hidden states of the next step, which stay on the GPU. The host gives state only
when other sequences run than before, and gets a step's tokens back in one copy.

What fills up the number of sequences decodes too, for nothing, in slots of the cache that no sequence holds, always at
their first positions. Beams of a width above 1 are not captured; the engine runs those itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import triton
from torch import Tensor

from fourfold.engine.draft_plan import DraftShape
from fourfold.engine.draft_tree import DraftTree
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.speculative import draft, verify
from fourfold.modeling.decode import decode_forward
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer


@dataclass(frozen=True)
class StepTokens:
    """What a step gave one sequence."""

    tokens: list[int]
    """The drafts that were kept, and the token after them."""
    drafts: int
    """Drafts that were verified."""


def padded_batch(running: int, max_num_seqs: int) -> int:
    """For how many sequences a step is captured that `running` can use; less than a third of them is padding."""
    multiple = max(1, triton.next_power_of_2(running) // 4)
    return min(max_num_seqs, triton.cdiv(running, multiple) * multiple)


class DecodeGraphs:
    """The captured steps of one engine, and their buffers on the GPU."""

    def __init__(
        self, target: Transformer, drafter: Redrafter | None, cache: KVCache, hidden: Tensor, max_num_seqs: int
    ) -> None:
        """Takes little memory; a step's is taken when it is captured.

        Args:
            target, drafter: the models.
            cache: the engine's cache, of max_num_seqs slots or more.
            hidden: [max_num_seqs, hidden], the target's state at each sequence's newest token.
        """
        self.target, self.drafter, self.cache, self.hidden = target, drafter, cache, hidden
        self.max_num_seqs = max_num_seqs
        # For measurements: takes a step's drafts, the sampling parameters and the tokens so far; gives other drafts.
        self.replace_drafts: Callable[[DraftTree, SamplingBatch, Tensor], DraftTree] | None = None
        # Captured steps read these tables where they are now, whatever longer ones the model may make.
        self._tables = target.rope_tables(cache.length)
        device = target.device
        self._state = torch.zeros(4, max_num_seqs, dtype=torch.int64, device=device)
        self._batch = SamplingBatch(
            temperature=torch.ones(max_num_seqs, device=device),
            top_p=torch.ones(max_num_seqs, device=device),
            top_k=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            min_p=torch.zeros(max_num_seqs, device=device),
            seed=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            sampled_rows=torch.arange(max_num_seqs, device=device),
            has_sampled=False,
            has_greedy=True,
            has_top_p=False,
            has_top_k=False,
            has_min_p=False,
            greedy=torch.ones(max_num_seqs, dtype=torch.bool, device=device),
        )
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._steps: dict[tuple[int | DraftShape, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def load(self, running: list[Sequence], batch: SamplingBatch) -> None:
        """Gives the sequences that run from now on, in the order of their slots, with their sampling parameters."""
        count = len(running)
        values = [
            [sequence.last_token for sequence in running],
            # The newest token is not in the cache yet: its position is the number of tokens before it.
            [sequence.length - 1 for sequence in running],
            [len(sequence.output.token_ids) for sequence in running],
            [1] * count,
        ]
        self._state.zero_()[:, :count] = torch.tensor(values, device=self._state.device)
        ours = self._batch
        for name in ("top_p", "top_k", "min_p", "seed"):
            getattr(ours, name)[:count] = getattr(batch, name)
        assert ours.greedy is not None
        ours.greedy.fill_(True)[:count] = batch.temperature == 0
        ours.temperature.fill_(1.0)[:count] = torch.where(batch.temperature == 0, 1.0, batch.temperature)
        kinds = ("has_sampled", "has_top_p", "has_top_k", "has_min_p")
        self._batch = replace(ours, **{name: getattr(batch, name) for name in kinds})

    def step(self, running: int, shape: DraftShape) -> tuple[list[StepTokens], Tensor]:
        """Decodes once for the sequences of the last `load`. shape: one beam, or no drafts.

        Returns what each got, and the logits that its tokens were chosen from, float32 [running, beam_length, vocab],
        which hold until the next step.
        """
        size = padded_batch(running, self.max_num_seqs)
        batch = self._batch
        key = (size, shape, batch.has_sampled, batch.has_top_p, batch.has_top_k, batch.has_min_p)
        if key not in self._steps:
            self._steps[key] = self._capture(size, shape)
        graph, out, logits = self._steps[key]
        graph.replay()
        steps = [StepTokens([*row[1 : row[-3] + 1], row[-2]], row[-1]) for row in out[:running].tolist()]
        return steps, logits[:running]

    def replay_ms(self, times: int) -> float:
        """Median milliseconds of the newest captured step, replayed at one and the same state. For measurements."""
        graph, _, _ = list(self._steps.values())[-1]
        state, hidden = self._state.clone(), self.hidden.clone()
        spans = []
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            self._state.copy_(state)
            self.hidden.copy_(hidden)
            end.synchronize()
            spans.append(begin.elapsed_time(end))
        return median(spans)

    def _capture(self, size: int, shape: DraftShape) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # What is built or chosen at a first call must not be captured, so the step runs once before, on a stream of its
        # own; it writes the cache's places that the replay writes again, and its other effects are undone.
        state, hidden = self._state.clone(), self.hidden.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.body(size, shape)
        torch.cuda.current_stream().wait_stream(stream)
        self._state.copy_(state)
        self.hidden.copy_(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out, logits = self.body(size, shape)
        return graph, out, logits

    @torch.inference_mode()
    def body(self, size: int, shape: DraftShape) -> tuple[Tensor, Tensor]:
        """The step itself, for the first `size` rows of the buffers; waits for nothing.

        Returns int64 [size, beam_length + 3]: the newest token, the drafts, how many of them are kept, the token after
        those, and how many were verified; and the logits, float32 [size, beam_length, vocab].
        """
        last, start, index, active = self._state[:, :size]
        batch, row = self._sampling(size), torch.arange(size, device=last.device)
        if shape.beam_length == 1:
            newest = decode_forward(self.target, last[:, None], start[:, None], self.cache)[:, 0]
            logits = self.target.logits(newest)[:, None]
            following = choose(logits[:, 0], batch, index)
            kept = sizes = torch.zeros_like(last)
            tokens = last[:, None]
        else:
            assert self.drafter is not None
            tree = draft(self.drafter, self.target, self.hidden[:size], last, shape)
            tree = tree if self.replace_drafts is None else self.replace_drafts(tree, batch, index)
            positions = start[:, None] + tree.offsets
            hidden = decode_forward(self.target, tree.tokens, positions, self.cache)
            logits = self.target.logits(hidden)
            node, following = verify(logits, tree, batch, index)
            newest, kept, sizes, tokens = hidden[row, node], tree.depths[row, node], tree.sizes, tree.tokens
        out = torch.cat((tokens, torch.stack((kept, following, sizes), 1)), 1)
        self.hidden[:size] = newest
        last.copy_(following)
        for counter in (start, index):
            counter += (kept + 1) * active
        return out, logits

    def _sampling(self, size: int) -> SamplingBatch:
        """The parameters of the first rows."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "sampled_rows", "greedy")
        return replace(self._batch, **{name: getattr(self._batch, name)[:size] for name in names})
