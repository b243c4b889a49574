"""Prompts on a GPU as CUDA graphs: one launch a prompt, where launching its kernels one by one takes longer.

A graph is captured for each number of tokens (rounded up). It reads the prompt into a cache of its own, of one slot,
from which keys and values are then copied to the sequence's: so it does not depend on the slot. What fills up the
number of tokens repeats the last one behind the prompt, where it changes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.modeling.attention import padded_length
from fourfold.modeling.captures import Captures
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.prefill import prefill_forward
from fourfold.modeling.transformer import Transformer


class PromptGraphs:
    """The captured prompts of one engine, and their cache."""

    def __init__(self, target: Transformer, longest: int, dtype: torch.dtype, captures: Captures) -> None:
        """Takes the cache's memory; a graph's is taken when it is captured.

        Args: the model; tokens of the longest prompt; dtype of the engine's cache; captures of the engine's graphs.
        """
        self.target, self.longest = target, longest
        self._cache = KVCache.allocate(target.config, 1, longest, target.device, dtype)
        # Captured prompts read these tables where they are now, whatever longer ones the model may make.
        self._tables = target.rope_tables(self._cache.length)
        self._captures = captures
        self._prompts: dict[int, tuple[Tensor, Callable[[], None], Tensor]] = {}

    @torch.inference_mode()
    def read(self, tokens: list[int], slot: KVCache) -> Tensor:
        """Reads a prompt, or the beginning of one, into a slot.

        Args: its token ids, `longest` at most; the slot that is its own.
        Returns the hidden states after the final norm, [1, tokens, hidden], until the next prompt is read.
        """
        count, size = len(tokens), padded_length(len(tokens), self.target.config.head_dim, self.target.device)
        if size not in self._prompts:
            place = torch.zeros(1, size, dtype=torch.int64, device=self.target.device)
            self._prompts[size] = place, *self._capture(place)
        place, replay, hidden = self._prompts[size]
        place.copy_(torch.tensor([[*tokens, *tokens[-1:] * (size - count)]]))
        replay()
        slot.copy(self._cache, count)
        return hidden[:, :count]

    def _capture(self, tokens: Tensor) -> tuple[Callable[[], None], Tensor]:
        return self._captures.capture(lambda: self.body(tokens))

    @torch.inference_mode()
    def body(self, tokens: Tensor) -> Tensor:
        """Reads tokens into the first places of the own cache, int64 [1, tokens] → states [1, tokens, hidden].

        All that attention looks at is new, so nothing that an earlier prompt has left can reach this one.
        """
        size = tokens.shape[1]
        positions = torch.arange(size, device=tokens.device)[None]
        return prefill_forward(self.target, tokens, positions, self._cache, size)
