"""A running request: its tokens, its text as it grows, and when it ends."""

import time
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fourfold.engine.requests import RequestOutput, SamplingParams


class Sequence:
    """What the engine keeps of a request. `slot` is its place in the KV cache while it runs."""

    def __init__(
        self, output: RequestOutput, params: SamplingParams, end_token_ids: frozenset[int], tokenizer: Tokenizer
    ) -> None:
        self.output, self.params = output, params
        self.slot = -1
        self.num_computed_tokens = 0
        """Prompt tokens that are in the cache."""
        self.is_broken = False
        """Whether its scores are not finite, nor perhaps what it has in the cache."""
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_token_ids)
        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self._longest_stop = max(map(len, params.stop), default=0)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.output.prompt_token_ids) + len(self.output.token_ids)

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self.output.token_ids[-1]

    def append(self, token: int) -> bool:
        """Adds a generated token; True when the request has ended with it, or failed because there is none."""
        output = self.output
        if token < 0:  # there was nothing to choose from
            self.is_broken = True
            return self.fail(
                f"the scores of token {len(output.token_ids) + 1} hold a NaN or an infinity: a weight of the model is "
                "broken, or its numbers grow out of range; make the checkpoint and the engine again"
            )
        output.token_ids.append(token)
        if output.first_token_time is None:
            output.first_token_time = time.perf_counter()
        if token in self._ends:
            # As vLLM has it: null for the model's own end of text.
            output.stop_reason = token if token in self.params.stop_token_ids else None
            return self.finish("stop")
        known = len(output.text)
        output.text += self._stream.step(self._tokenizer, token) or ""
        if self._longest_stop and len(output.text) > known:
            # A stop string may have begun in the text that was there before.
            start = max(0, known - self._longest_stop + 1)
            found = [(at, stop) for stop in self.params.stop if (at := output.text.find(stop, start)) >= 0]
            if found:
                at, output.stop_reason = min(found)
                output.text = output.text[:at]
                return self.finish("stop")
        if len(output.token_ids) >= self.params.max_tokens:
            return self.finish("length")
        return False

    def count(self, kept: int, drafts: int, beam_length: int) -> None:
        """Counts a verification, unless the request has ended before it.

        Args: drafts that were kept, and that there were; tokens of a beam.
        """
        if self.output.finish_reason is not None:
            return
        stats = self.output.speculation
        stats.num_drafts += 1
        stats.num_draft_tokens += drafts
        accepted = stats.accepted_per_position
        accepted += [0] * (beam_length - 1 - len(accepted))
        for position in range(kept):
            accepted[position] += 1

    def fail(self, message: str) -> bool:
        """Ends the request with an error; always True."""
        self.output.error = message
        return self.finish("error")

    def fail_for_memory(self, when: str) -> bool:
        """Ends the request because memory could not be had; always True."""
        return self.fail(f"out of memory {when}; lower max_num_seqs or max_model_len, or leave more memory free")

    def forget_untold(self) -> None:
        """Drops probabilities of tokens that did not come to be."""
        del self.output.logprobs[len(self.output.token_ids) :]

    def finish(self, reason: Any) -> bool:
        """Ends the request; always True."""
        # The last step may have told of tokens beyond the end.
        self.forget_untold()
        self.output.finish_reason = reason
        self.output.finished_time = time.perf_counter()
        return True
