"""Reads the prompts of waiting requests into slots of the cache, in the order of their arrival, and has them run.

A step reads `max_num_batched_tokens` at most, so that a long prompt holds up the running requests no longer than that
takes; what it has read so far waits in a slot of its own, out of the way of what a decoding step writes.
"""

import sys
import time
from collections import deque

import torch
from torch import Tensor

from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.sequence import Sequence
from fourfold.engine.slots import Slots
from fourfold.engine.tell import tell, tell_prompt
from fourfold.errors import is_out_of_memory
from fourfold.modeling.transformer import Transformer

PREFILL_CHUNK = 512
"""Prompt tokens in one forward: bounds the memory that a long prompt takes."""


class Prefill:
    """The requests that wait for their first token."""

    def __init__(
        self, target: Transformer, slots: Slots, max_num_seqs: int, max_num_batched_tokens: int | None
    ) -> None:
        """Takes no memory. Arguments as of the engine; slots: where sequences run."""
        self.target, self.slots, self.max_num_seqs = target, slots, max_num_seqs
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
            sequence = self.reading or self.waiting[0]
            source, known = self.slots.find(sequence) if self.reading is None else (-1, sequence.num_computed_tokens)
            rest = len(sequence.output.prompt_token_ids) - known
            # What fits into a step is read in one; where a prompt is cut depends on nothing else that is read.
            if rest > left and left < self.max_num_batched_tokens:
                break
            if self.reading is None:
                self._start(sequence)
                self.slots.place(sequence, rest > left, source, known)
            self.reading = sequence if rest > left else None
            if not self._read(sequence, min(rest, left)):
                self.reading = None
            left -= min(rest, left)
            if self.reading is None:
                read.append(sequence)
        return read

    def _start(self, sequence: Sequence) -> None:
        self.waiting.popleft()
        sequence.output.scheduled_time = time.perf_counter()

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

    def _compute(self, sequence: Sequence, tokens: int) -> Tensor:
        """Reads the next tokens of a prompt; returns the hidden state at the last of them, [1, hidden]."""
        cache = self.slots.cache.slots(sequence.slot, sequence.slot + 1)
        begin = sequence.num_computed_tokens
        stop = begin + tokens
        for start in range(begin, stop, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, stop)
            chunk = self._tensor([sequence.output.prompt_token_ids[start:end]])
            positions = torch.arange(start, end, device=chunk.device)[None]
            hidden = self.target.forward(chunk, positions, cache, end)
            if sequence.params.prompt_logprobs is not None:
                tell_prompt(sequence, self.target, hidden[0], start)
            sequence.num_computed_tokens = end
        return hidden[:, -1]

    def _run(self, sequences: list[Sequence], newest: Tensor) -> None:
        """Generates the first tokens of requests whose prompts are read, and lets them run.

        newest: [sequences, hidden], the target's states at their last tokens.
        """
        logits = self.target.logits(newest)
        batch = SamplingBatch.of([sequence.params for sequence in sequences], newest.device)
        tokens = choose(logits, batch, self._tensor([0] * len(sequences))).tolist()
        tell(sequences, logits[:, None], [[token] for token in tokens])
        for sequence, token, hidden in zip(sequences, tokens, newest, strict=True):
            self.slots.run(sequence, hidden)
            sequence.append(token)

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.target.device)
