"""What goes into the engine and what comes out: sampling parameters, and a request's output with its timings."""

from dataclasses import dataclass, field
from typing import Literal

from fourfold.engine.logprobs import TokenLogprob
from fourfold.errors import FourfoldError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends; names and defaults as in vLLM.

    Raises FourfoldError when a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    seed: int = 0
    """The same seed, prompt and engine give the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; they are not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end generation, beside the model's own end-of-text tokens."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    logprobs: int | None = None
    """How many of the most likely tokens are told with each generated token; None computes no probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "stop": all(self.stop),
            "logprobs": self.logprobs is None or self.logprobs >= 0,
            "prompt_logprobs": self.prompt_logprobs is None or self.prompt_logprobs >= 0,
        }
        for name, valid in checks.items():
            if not valid:
                raise FourfoldError(f"{name}: {getattr(self, name)!r} is out of range")


@dataclass
class SpeculationStats:
    """Counts of speculative decoding, for one request.

    acceptance_length = 1 + accepted / drafts: it counts the token that every verification yields beside the drafts.
    """

    num_drafts: int = 0
    """Verifications that had draft tokens to check."""
    num_draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    """[i] = verifications in which draft token i and all before it were accepted."""

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens that were accepted."""
        return sum(self.accepted_per_position)

    @property
    def acceptance_length(self) -> float | None:
        """1 + accepted / drafts; None without drafts."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass
class RequestOutput:
    """What is known of a request so far. Times are seconds of `time.perf_counter`."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, end-of-text included."""
    text: str = ""
    """Generated text without special tokens, and without a stop string."""
    num_cached_tokens: int = 0
    """Prompt tokens that were in the KV cache already and not read again."""
    finish_reason: FinishReason | None = None
    """None while the request runs."""
    error: str | None = None
    """What went wrong, if it ended with finish_reason `error`."""
    stop_reason: int | str | None = None
    """The request's stop token or stop string that ended it, if one did."""
    arrival_time: float = 0.0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each generated token, if they were asked for."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each token of the prompt, if they were asked for."""

    def check(self) -> None:
        """Raises FourfoldError when the request has failed."""
        if self.error is not None:
            raise FourfoldError(f"{self.request_id}: {self.error}")
