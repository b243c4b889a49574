"""What the engine's thread sends for the requests of one HTTP call, until the call takes it.

A call that is slower than the engine finds what came meanwhile in one piece, so nothing piles up.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fourfold.engine.logprobs import TokenLogprob
from fourfold.engine.requests import RequestOutput


@dataclass
class Delta:
    """What is new of a request."""

    text: str = ""
    """Whole characters only, and none that a stop string could still take back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: RequestOutput | None = None
    """The whole output, once the request has ended."""

    def add(self, later: "Delta") -> None:
        """Appends what came after it."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.last = later.last


class Collector:
    """Deltas of a call's requests, numbered from 0. Belongs to the event loop."""

    def __init__(self, requests: int) -> None:
        self._open = requests
        self._news: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._event = asyncio.Event()

    def put(self, number: int, delta: Delta) -> None:
        """Adds a delta to what waits for the call."""
        if number in self._news:
            self._news[number].add(delta)
        else:
            self._news[number] = delta
        self._event.set()

    def fail(self, error: Exception) -> None:
        """Ends the call's reading with an error."""
        self._error = error
        self._event.set()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(request, delta) as they come, each with text to show or the end of its request; ends with the last one.

        Raises what `fail` was given.
        """
        while self._open:
            await self._event.wait()
            self._event.clear()
            if self._error is not None:
                raise self._error
            # Tokens without text yet wait for those that complete it.
            for number in [number for number, delta in self._news.items() if delta.text or delta.last]:
                delta = self._news.pop(number)
                self._open -= delta.last is not None
                yield number, delta
