"""Which sequence has which slot of the KV cache.

Running sequences have the first slots, without a gap: when one ends, the last one moves into its place. Behind them
come lanes, one more for each beam of a draft; behind all of those lies what ended sequences left, and the slot in which
a prompt is read that takes several steps.
"""

from torch import Tensor

from fourfold.engine.draft_tree import DraftTree
from fourfold.engine.prefixes import Prefixes
from fourfold.engine.sequence import Sequence
from fourfold.modeling.beams import Beams, open_lanes
from fourfold.modeling.kv_cache import KVCache


class Slots:
    """The slots of one engine's cache, and the sequences that run in them."""

    def __init__(self, cache: KVCache, hidden: Tensor, prefixes: Prefixes | None, reading_slot: int) -> None:
        """Takes no memory.

        Args:
            cache: the engine's cache.
            hidden: [max_num_seqs, hidden], the target's state at each running sequence's newest token.
            prefixes: what ended sequences leave, if it is kept.
            reading_slot: the slot for a prompt that takes several steps; 0 if there is none.
        """
        self.cache, self.hidden, self.reading_slot = cache, hidden, reading_slot
        self.running: list[Sequence] = []
        self.lanes = 1
        """How many lanes of the running sequences hold what their own slots hold."""
        self._prefixes = prefixes

    def find(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds the longest known beginning of a prompt, and how many tokens that is."""
        # Probabilities of the prompt's tokens need the hidden states of all.
        if self._prefixes is None or sequence.params.prompt_logprobs is not None:
            return -1, 0
        return self._prefixes.find(sequence.output.prompt_token_ids)

    def place(
        self, sequence: Sequence, in_parts: bool = False, source: int = -1, known: int = 0, behind: int = 0
    ) -> None:
        """Gives a sequence whose prompt is to be read its slot, and what is known of the prompt already.

        Args: whether its prompt takes several steps; what `find` gave; how many others are placed but do not run yet.
        """
        sequence.slot = self.reading_slot if in_parts else len(self.running) + behind
        if known and source != sequence.slot:
            self.cache.move(source, sequence.slot, known)
        if sequence.slot != self.reading_slot:
            self.take(sequence.slot + 1)
        sequence.output.num_cached_tokens = sequence.num_computed_tokens = known

    def run(self, sequence: Sequence, newest: Tensor) -> None:
        """Lets a sequence run whose prompt was read. newest: [hidden], the target's state at its last token."""
        slot = len(self.running)
        if sequence.slot != slot:
            self.take(slot + 1)
            self.cache.move(sequence.slot, slot, sequence.length)
            sequence.slot = slot
        self.hidden[slot] = newest
        self.running.append(sequence)
        self.lanes = 1

    def take(self, slots: int) -> None:
        """Says that the first `slots` slots are written."""
        if self._prefixes is not None:
            self._prefixes.take(slots)

    def open_lanes(self, tree: DraftTree) -> Beams | None:
        """Makes sure that each beam of the running sequences has its lane; None for a single beam, which needs none."""
        beams = tree.beams
        if beams is not None and beams.width > self.lanes:
            length = max(sequence.length for sequence in self.running)
            self.take(len(self.running) * beams.width)
            open_lanes(self.cache, len(self.running), self.lanes, beams.width, length)
            self.lanes = beams.width
        return beams

    def release(self, ended: list[Sequence], reading: Sequence | None) -> None:
        """Takes sequences off the running ones. reading: the one whose prompt is being read."""
        for sequence in ended:
            newest = self.running.pop()
            self._keep(sequence)
            if sequence.is_broken:
                # A shorter sequence that moves here leaves the places behind it as they are.
                self._empty(sequence.slot, sequence.slot + 1)
            if newest is not sequence:
                self.cache.move(newest.slot, sequence.slot, newest.length)
                self.hidden[sequence.slot] = self.hidden[newest.slot]
                self.running[sequence.slot] = newest
                newest.slot = sequence.slot
            sequence.slot = -1
            self.lanes = 1
        if any(sequence.is_broken for sequence in ended):
            self._clear(reading)

    def _keep(self, sequence: Sequence) -> None:
        """Keeps what a sequence that ends has in the cache; the running ones and the newest's slot stay as they are."""
        output = sequence.output
        # Without a generated token the prompt may not have been read. The newest token is not in the cache yet.
        if self._prefixes is not None and output.token_ids and output.error is None:
            known = [*output.prompt_token_ids, *output.token_ids[:-1]]
            self.cache.move(sequence.slot, self._prefixes.keep(known, len(self.running) + 1), len(known))

    def _clear(self, reading: Sequence | None) -> None:
        """Empties all slots that no sequence holds."""
        end = self.cache.num_slots
        if reading is not None and reading.slot == self.reading_slot > 0:
            end = self.reading_slot
        self._empty(len(self.running), end)
        self.take(end)

    def _empty(self, start: int, stop: int) -> None:
        """Empties the slots start … stop-1: attention multiplies what it masks by 0, a NaN too."""
        self.cache.slots(start, stop).raw.zero_()
