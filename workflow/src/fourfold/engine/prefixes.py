"""What ended sequences left in the KV cache, for prompts that begin as they did.

A conversation that goes on, or a generation that paused to run a tool, comes back as a longer prompt: what it had
before need not be read again. An ended sequence is kept in a slot at the cache's far end, where it lies until running
ones need that slot, or one that ended later does. The engine has one slot more than can run, so there is always one.
"""

from collections.abc import Sequence


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Prefixes:
    """Which slot holds which tokens; knows nothing of the cache's memory."""

    def __init__(self, slots: int) -> None:
        """slots: all slots of the cache, of which running sequences use the first."""
        self._slots = slots
        # The one that was used last comes last.
        self._kept: dict[int, list[int]] = {}

    def find(self, token_ids: list[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of a prompt, and how long that is; (-1, 0) if none does.

        The prompt's last token does not count: it has to be read, to know what follows it.
        """
        lengths = {slot: common_length(kept, token_ids[:-1]) for slot, kept in self._kept.items()}
        slot = max(lengths, key=lambda slot: lengths[slot], default=-1)
        if not lengths.get(slot):
            return -1, 0
        self._kept[slot] = self._kept.pop(slot)
        return slot, lengths[slot]

    def take(self, slots: int) -> None:
        """Forgets what lies in the first `slots` slots: they are about to be written."""
        for slot in [slot for slot in self._kept if slot < slots]:
            del self._kept[slot]

    def keep(self, token_ids: list[int], used: int) -> int:
        """Notes tokens and returns the slot that their keys and values are to be copied to, before any other call.

        Takes the place of a beginning of theirs, else a free slot, else that of the tokens that were used longest ago.

        Args: the tokens that are in the cache; how many of the first slots cannot be had, fewer than all.
        """
        slot = next((s for s, kept in self._kept.items() if kept == token_ids[: len(kept)]), None)
        if slot is None:
            slot = next((s for s in reversed(range(used, self._slots)) if s not in self._kept), None)
        if slot is None:
            slot = next(iter(self._kept))
        self._kept.pop(slot, None)
        self._kept[slot] = token_ids
        return slot
