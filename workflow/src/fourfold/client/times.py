"""When the tokens of an answer came."""

from dataclasses import dataclass, field


@dataclass
class RequestTimes:
    """When a client sent a request and received its tokens, seconds of `time.perf_counter`.

    A chunk is what came in one server-sent event; with speculative decoding it holds several tokens.
    """

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    """One for each chunk that brought tokens."""
    sizes: list[int] = field(default_factory=list)
    """Tokens of each chunk."""
    finished: float | None = None
    """When the last chunk came; None for a request that did not end by itself."""

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(self.sizes)

    def see(self, total_tokens: int, now: float) -> None:
        """Notes that the request has `total_tokens` tokens at time `now`."""
        new = total_tokens - self.tokens
        if new > 0:
            self.times.append(now)
            self.sizes.append(new)
