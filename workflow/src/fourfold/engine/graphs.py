"""Decoding steps on a GPU as CUDA graphs: one launch a step, where launching its kernels one by one takes longer.

A step is captured once for each number of sequences (rounded up), draft and kind of sampling: draft, verify, choose,
and the newest tokens, positions and hidden states of the next step, which stay on the GPU. The host gives state only
when other sequences run than before, and gets a step's tokens back in one copy.

What fills up the number of sequences decodes too, for nothing, in slots of the cache that no sequence holds, always at
their first positions.

A draft of several beams is a trunk with leaves (`trunk_tree`): all nodes of a sequence lie in its own slot, and
attention's masks tell them apart. Where several sequences run, they share the rows of the verification: who is likelier
to be right has more of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import triton
from torch import Tensor

from fourfold.engine.draft_plan import DraftShape
from fourfold.engine.keep_kernel import keep_drafts
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.speculative import choose_everywhere
from fourfold.engine.trunk_tree import draft_trunk
from fourfold.modeling.captures import Captures
from fourfold.modeling.decode import decode_forward
from fourfold.modeling.draft_decode import DraftChain
from fourfold.modeling.keep_path import keep_path
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.noise import DraftNoise
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.split_product import MAX_ROWS
from fourfold.modeling.transformer import Transformer
from fourfold.modeling.trunk_tree import TrunkTree


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the GPU computes or has computed."""

    shape: DraftShape
    out: Tensor
    """What `DecodeGraphs.body` returns, on its way to the host."""
    logits: Tensor
    """[rows, vocab], what the tokens are chosen from; until the next step is launched."""
    done: torch.cuda.Event | None
    """When `out` has arrived; None if it has."""

    def tokens(self) -> list[list[int]]:
        """What each sequence got: the drafts that were kept, and the token after them. Waits for the step."""
        self._wait()
        return [[*row[1 : row[-2] + 1], row[-1]] for row in self.out.tolist()]

    def rows(self) -> Tensor:
        """The rows that chose them, int64 [running, beam_length]; beyond the kept drafts any. Waits for the step."""
        self._wait()
        length = self.shape.beam_length
        return self.out[:, 2 * length : 3 * length]

    def drafts(self) -> list[int]:
        """How many drafts of each sequence were verified. Waits for the step."""
        self._wait()
        drafts: list[int] = self.out[:, -3].tolist()
        return drafts

    def _wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


def padded_batch(running: int, max_num_seqs: int) -> int:
    """For how many sequences a step is captured that `running` can use; less than a third of them is padding."""
    multiple = max(1, triton.next_power_of_2(running) // 4)
    return min(max_num_seqs, triton.cdiv(running, multiple) * multiple)


class DecodeGraphs:
    """The captured steps of one engine, and their buffers on the GPU."""

    def __init__(
        self,
        target: Transformer,
        drafter: Redrafter | None,
        cache: KVCache,
        hidden: Tensor,
        max_num_seqs: int,
        chain: DraftChain | None = None,
        captures: Captures | None = None,
    ) -> None:
        """Takes little memory; a step's is taken when it is captured.

        Args:
            target, drafter: the models.
            cache: the engine's cache, of max_num_seqs slots or more.
            hidden: [max_num_seqs, hidden], the target's state at each sequence's newest token.
            chain: the drafter's, where there is a drafter.
            captures: of the engine's graphs; None makes one.
        """
        self.target, self.drafter, self.cache, self.hidden = target, drafter, cache, hidden
        self.max_num_seqs, self.chain = max_num_seqs, chain
        # For measurements: of a step's tokens, what was chosen after each, the sampling parameters and the numbers of
        # generated tokens, it makes what counts as chosen.
        self.replace_chosen: Callable[[Tensor, Tensor, SamplingBatch, Tensor], Tensor] | None = None
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
        self._captures = captures or Captures()
        self._steps: dict[tuple[int | DraftShape, ...], tuple[Callable[[], None], Tensor, Tensor]] = {}

    def slots(self, running: int) -> int:
        """How many slots of the cache a step for so many sequences writes to, filled up ones among them."""
        return padded_batch(running, self.max_num_seqs)

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

    def launch(self, running: int, shape: DraftShape) -> LaunchedStep:
        """Has the sequences of the last `load` decode once, and returns at once.

        A step may be launched before the tokens of the last one are known.
        """
        size = self.slots(running)
        batch = self._batch
        key = (size, shape, batch.has_sampled, batch.has_top_p, batch.has_top_k, batch.has_min_p)
        if key not in self._steps:
            self._steps[key] = self._capture(size, shape)
        replay, out, logits = self._steps[key]
        replay()
        arriving, done = out[:running].to("cpu", non_blocking=True), None
        if self.target.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return LaunchedStep(shape, arriving, logits, done)

    def replay_ms(self, times: int) -> float:
        """Median milliseconds of the newest captured step, replayed at one and the same state. For measurements."""
        replay, _, _ = list(self._steps.values())[-1]
        state, hidden = self._state.clone(), self.hidden.clone()
        spans = []
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            self._state.copy_(state)
            self.hidden.copy_(hidden)
            end.synchronize()
            spans.append(begin.elapsed_time(end))
        return median(spans)

    def _capture(self, size: int, shape: DraftShape) -> tuple[Callable[[], None], Tensor, Tensor]:
        state, hidden = self._state.clone(), self.hidden.clone()

        def undo() -> None:
            # The cache's places that the step wrote the replay writes again.
            self._state.copy_(state)
            self.hidden.copy_(hidden)

        replay, (out, logits) = self._captures.capture(lambda: self.body(size, shape), undo)
        return replay, out, logits

    @torch.inference_mode()
    def body(self, size: int, shape: DraftShape) -> tuple[Tensor, Tensor]:
        """The step itself, for the first `size` rows of the buffers; waits for nothing.

        Returns what `keep_drafts` returns (a token of -1: the logits are broken), and the logits, [rows, vocab].
        """
        last, start, index, runs = self._state[:, :size]
        batch, length = self._sampling(size), shape.beam_length
        if length == 1:
            hidden = decode_forward(self.target, last[:, None], start[:, None], self.cache)
            logits = self.target.logits(hidden)
            chosen = choose(logits, batch, index)
            return keep_drafts(last[:, None], chosen, None, 1, hidden, self._state, self.hidden), logits
        tree = self._draft(last, shape, batch.draft_noise(index), runs)
        rows, nodes = (None, None) if tree.packed is None else (tree.packed.rows, tree.packed.nodes)
        positions = start[:, None] + tree.depths
        hidden = decode_forward(self.target, tree.row_tokens, positions, self.cache, tree.masks, tree.packed)
        logits = self.target.logits(hidden)
        chosen = choose_everywhere(logits, tree.depths, batch, index, nodes)
        if self.replace_chosen is not None:
            chosen = self.replace_chosen(tree.tokens, chosen.view(tree.tokens.shape), batch, index).flatten()
        parents = None if tree.masks is None else tree.parents
        out = keep_drafts(tree.tokens, chosen, parents, length, hidden, self._state, self.hidden, rows)
        if tree.masks is not None:
            keep_path(self.cache.data, positions[:, 0], out[:, length : 2 * length], out[:, -2])
        return out, logits

    def _draft(self, last: Tensor, shape: DraftShape, noise: DraftNoise | None, runs: Tensor) -> TrunkTree:
        hidden, drafts, nodes = self.hidden[: len(last)], shape.beam_length - 1, shape.nodes - 1
        # A sequence alone has no one to share with.
        most = shape.most_nodes - 1 if shape.shares and len(last) > 1 else None
        if self.chain is not None and len(last) <= MAX_ROWS:
            return self.chain(hidden, last, drafts, shape.beam_width, nodes, noise, most, runs)
        assert self.drafter is not None
        return draft_trunk(self.drafter, self.target, hidden, last, drafts, shape.beam_width, nodes, noise, most, runs)

    def _sampling(self, size: int) -> SamplingBatch:
        """The parameters of the first rows."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "sampled_rows", "greedy")
        return replace(self._batch, **{name: getattr(self._batch, name)[:size] for name in names})
