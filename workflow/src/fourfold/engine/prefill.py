"""Reads the prompts of waiting requests into slots of the cache, in the order of their arrival, and has them run.

A step reads `max_num_batched_tokens` at most, so that a long prompt holds up the running requests no longer than that
takes; what it has read so far waits in a slot of its own, out of the way of what a decoding step writes.

On a GPU, where launching the kernels of a forward takes longer than a short prompt's arithmetic, a short prompt is a
CUDA graph (`engine.prompt_graphs`). Several are read in one forward, and so is the rest of longer ones of which
something is known. On a CPU each is read by itself: there a token's bits depend on nothing else that is read. A prompt
for which several answers are wanted is read once.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.slots import Slots
from fourfold.engine.tell import tell, tell_prompt
from fourfold.errors import is_out_of_memory
from fourfold.modeling.attention import padded_length
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.transformer import Transformer

if TYPE_CHECKING:
    from fourfold.engine.prompt_graphs import PromptGraphs

PREFILL_CHUNK = 512
"""Prompt tokens in one forward: bounds the memory that a long prompt takes."""
PREFILL_ROWS = 2048
"""Tokens of several prompts in one forward, padding included: bounds the memory that they take together."""
PREFILL_KEYS = 32768
"""Keys that they look at in one forward, known ones among them, padding included: bounds it too."""


@dataclass
class Found:
    """A request that waits, and what is known of its prompt."""

    sequence: Sequence
    source: int
    """The slot that holds its beginning."""
    known: int
    """How many tokens of it."""
    twins: list[Sequence] = field(default_factory=list)
    """Others that wait with the same prompt."""

    @property
    def rest(self) -> int:
        """How many tokens are to be read."""
        return len(self.sequence.output.prompt_token_ids) - self.known


def have_one_prompt(a: Sequence, b: Sequence) -> bool:
    """Whether the prompt of `a`, once it is read, need not be read for `b`."""
    return b.params.prompt_logprobs is None and a.output.prompt_token_ids == b.output.prompt_token_ids


class Prefill:
    """The requests that wait for their first token."""

    def __init__(
        self,
        target: Transformer,
        slots: Slots,
        max_num_seqs: int,
        max_num_batched_tokens: int | None,
        max_rows: int,
        graphs: "PromptGraphs | None" = None,
    ) -> None:
        """Takes no memory.

        Args:
            target: the model.
            slots: where sequences run.
            max_num_seqs, max_num_batched_tokens: as of the engine.
            max_rows: tokens, with their padding to whole blocks of keys, in a forward that reads several prompts; 0
                reads each by itself.
            graphs: the captured prompts, on a GPU.
        """
        self.graphs = graphs
        self.target, self.slots, self.max_num_seqs, self.max_rows = target, slots, max_num_seqs, max_rows
        self.with_kernels = target.device.type == "cuda"
        self.max_num_batched_tokens = max_num_batched_tokens or sys.maxsize
        self.waiting: deque[Sequence] = deque()
        self.reading: Sequence | None = None
        """The one that has a slot already: some of its prompt is read."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait, the one whose prompt is being read among them."""
        return len(self.waiting) + (self.reading is not None)

    @property
    def sequences(self) -> list[Sequence]:
        """They themselves, first come first."""
        return [*([] if self.reading is None else [self.reading]), *self.waiting]

    def drop(self, sequence: Sequence) -> None:
        """Forgets one of them."""
        if sequence is self.reading:
            self.reading = None
        else:
            self.waiting.remove(sequence)

    def step(self) -> list[Sequence]:
        """Reads as much as a step may; returns those whose prompts were read: they run now, unless they have failed.

        Some may have ended with their first token; the caller takes them off the running ones.
        """
        left = self.max_num_batched_tokens
        read: list[Sequence] = []
        # No more than there are free slots.
        most = min(self.num_waiting, self.max_num_seqs - len(self.slots.running))
        while left > 0 and len(read) < most:
            together = self._find_together(most - len(read), left)
            if len(together) > 1:
                left -= sum(found.rest for found in together)
                read += self._read_together(together)
                continue
            sequence = self.reading or self.waiting[0]
            source, known = self._find(sequence) if self.reading is None else (-1, sequence.num_computed_tokens)
            rest = len(sequence.output.prompt_token_ids) - known
            # What fits into a step is read in one; where a prompt is cut depends on nothing else that is read.
            if rest > left and left < self.max_num_batched_tokens:
                break
            if self.reading is None:
                self._take(1)
                self.slots.place(sequence, rest > left, source, known)
            self.reading = sequence if rest > left else None
            if not self._read(sequence, min(rest, left)):
                self.reading = None
            left -= min(rest, left)
            if self.reading is None:
                read.append(sequence)
                if sequence in self.slots.running:
                    read += self._share_with_next(sequence, most - len(read))
        return read

    def _find(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds what is known of a prompt, and how many tokens of it are known."""
        # To read all of a short one takes less than to launch what reads the rest.
        if self.graphs is not None and 2 * len(sequence.output.prompt_token_ids) <= self.graphs.longest:
            return -1, 0
        return self.slots.find(sequence)

    def _take(self, count: int) -> None:
        """Takes the first requests off those that wait."""
        now = time.perf_counter()
        for _ in range(count):
            self.waiting.popleft().output.scheduled_time = now

    def _find_together(self, most: int, left: int) -> list[Found]:
        """The first waiting requests whose prompts one forward may read: all that is not known of them, if it is short.

        Args: most requests, most tokens.
        """
        together: list[Found] = []
        slot = len(self.slots.running)
        longest = end = 0
        for sequence in islice(self.waiting, most if self.reading is None and self.max_rows else 0):
            if twin := next((found for found in together if have_one_prompt(found.sequence, sequence)), None):
                twin.twins.append(sequence)
                continue
            if sequence.params.prompt_logprobs is not None:
                break
            found = Found(sequence, *self.slots.find(sequence))
            longest, end = max(longest, found.rest), max(end, found.known + found.rest)
            left -= found.rest
            rows, keys = (
                (len(together) + 1) * padded_length(tokens, self.target.config.head_dim, self.target.device)
                for tokens in (longest, end)
            )
            if rows > self.max_rows or keys > PREFILL_KEYS or longest > PREFILL_CHUNK or left < 0:
                break
            # What is known lies where one before it is to be read.
            if found.known and found.source < slot + len(together):
                break
            together.append(found)
        return together

    def _read_together(self, together: list[Found]) -> list[Sequence]:
        """Reads the first waiting requests' prompts in one forward, or one by one where that has no memory.

        Returns them all, those with the same prompts last.
        """
        sequences = [found.sequence for found in together]
        twins = [(found.sequence, twin) for found in together for twin in found.twins]
        self._take(len(sequences) + len(twins))
        for i, found in enumerate(together):
            self.slots.place(found.sequence, source=found.source, known=found.known, behind=i)
        self._run_or_read(sequences, lambda: self._compute_together(sequences))
        self._share(twins)
        return [*sequences, *(twin for _, twin in twins)]

    def _share_with_next(self, first: Sequence, most: int) -> list[Sequence]:
        """Has those of the next requests run that wait with the same prompt; returns them. Args: most of them."""
        twins = list(takewhile(partial(have_one_prompt, first), islice(self.waiting, most)))
        self._take(len(twins))
        self._share([(first, twin) for twin in twins])
        return twins

    def _share(self, twins: list[tuple[Sequence, Sequence]]) -> None:
        """Has requests run whose prompts were read for others. Args: those others, and each one's request."""
        alone = [twin for first, twin in twins if first not in self.slots.running]  # that one failed
        twins = [(first, twin) for first, twin in twins if first in self.slots.running]
        for i, (first, twin) in enumerate(twins):
            self.slots.place(twin, source=first.slot, known=first.num_computed_tokens, behind=i)
            twin.output.num_cached_tokens = first.output.num_cached_tokens
        if twins:
            slots = self._tensor([first.slot for first, _ in twins])
            self._run_or_read([twin for _, twin in twins], lambda: self.slots.hidden[slots])
        for sequence in alone:
            self._read_alone(sequence)

    def _run_or_read(self, sequences: list[Sequence], newest: Callable[[], Tensor]) -> None:
        """Has requests run whose slots follow each other, or reads each by itself where there is no memory for all.

        newest: gives the target's states at their prompts' ends, [sequences, hidden].
        """
        try:
            self._run(sequences, newest())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        # Not while the error is handled: it holds what the forward had taken.
        for sequence in sequences:
            sequence.forget_untold()
            self._read_alone(sequence)

    def _read_alone(self, sequence: Sequence) -> None:
        """Reads a whole prompt, whatever is known of it."""
        self.slots.place(sequence)
        self._read(sequence, len(sequence.output.prompt_token_ids))

    def _read(self, sequence: Sequence, tokens: int) -> bool:
        """Reads the next tokens of a prompt, and has the sequence run if they are the last; False if it has failed."""
        try:
            hidden = self._compute(sequence, tokens)
            if sequence.num_computed_tokens == len(sequence.output.prompt_token_ids):
                self._run([sequence], hidden)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sequence.fail_for_memory("while its prompt was read")
            return False
        return True

    def _compute(self, sequence: Sequence, count: int) -> Tensor:
        """Reads the next tokens of a prompt; returns the hidden state at the last of them, [1, hidden]."""
        cache = self.slots.cache.slots(sequence.slot, sequence.slot + 1)
        begin = sequence.num_computed_tokens
        stop = begin + count
        for start in range(begin, stop, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, stop)
            tokens = sequence.output.prompt_token_ids[start:end]
            hidden = self._states(tokens, start, cache)
            if sequence.params.prompt_logprobs is not None:
                tell_prompt(sequence, self.target, hidden[0], start)
            sequence.num_computed_tokens = end
        return hidden[:, -1]

    def _compute_together(self, sequences: list[Sequence]) -> Tensor:
        """Reads the rest of prompts in slots that follow each other; returns the states at their ends, [prompts,
        hidden].

        What fills up a prompt repeats its last token in its place, so that nothing but the prompt itself is in its
        slot.
        """
        parts = [sequence.output.prompt_token_ids[sequence.num_computed_tokens :] for sequence in sequences]
        longest, first = max(map(len, parts)), sequences[0].slot
        tokens = self._tensor([[*part, *[part[-1]] * (longest - len(part))] for part in parts])
        last = self._tensor([len(part) - 1 for part in parts])
        begins = self._tensor([sequence.num_computed_tokens for sequence in sequences])
        steps = torch.arange(longest, device=tokens.device)
        positions = begins[:, None] + torch.minimum(steps, last[:, None])
        for sequence, part in zip(sequences, parts, strict=True):
            sequence.num_computed_tokens += len(part)
        cache = self.slots.cache.slots(first, first + len(sequences))
        hidden = self._forward(tokens, positions, cache, max(sequence.num_computed_tokens for sequence in sequences))
        return hidden[torch.arange(len(sequences), device=last.device), last]

    def _states(self, tokens: list[int], start: int, slot: KVCache) -> Tensor:
        """Reads tokens of one prompt, from `start` on; returns the target's states, [1, tokens, hidden]."""
        if self.graphs is not None and start == 0 and len(tokens) <= self.graphs.longest:
            try:
                return self.graphs.read(tokens, slot)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Graphs keep memory of their own; what is launched takes what others leave.
            self.graphs = None
        end = start + len(tokens)
        positions = torch.arange(start, end, device=self.target.device)[None]
        return self._forward(self._tensor([tokens]), positions, slot, end)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """As `Transformer.forward`."""
        if self.with_kernels:
            from fourfold.modeling.prefill import prefill_forward  # Triton is there where a GPU is

            return prefill_forward(self.target, tokens, positions, cache, length)
        return self.target.forward(tokens, positions, cache, length)

    def _run(self, sequences: list[Sequence], newest: Tensor) -> None:
        """Generates the first tokens of requests whose prompts are read, and lets them run.

        newest: [sequences, hidden], the target's states at their last tokens.
        """
        logits = self.target.logits(newest)
        batch = SamplingBatch.of([sequence.params for sequence in sequences], newest.device)
        tokens = choose(logits, batch, self._tensor([0] * len(sequences))).tolist()
        tell(sequences, logits, [[token] for token in tokens])
        for sequence, token, hidden in zip(sequences, tokens, newest, strict=True):
            self.slots.run(sequence, hidden)
            sequence.append(token)

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.target.device)
