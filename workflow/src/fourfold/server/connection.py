"""The HTTP connection: uvicorn's, with limits on how long a client may take to send headers and to read."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 16 * 2**10
HEADER_SECONDS = 20.0
STALLED_SECONDS = 60.0
"""How long a client may read nothing while there is something for it."""


class Connection(H11Protocol):
    """One connection."""

    _headers: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Gives the client its time for the first headers."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Restarts no time: headers that come drop by drop have no more of it than others."""
        super().data_received(data)
        self._watch_headers()

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            _cancel(self._headers)
        elif self._headers is None or self._headers.cancelled():
            self._headers = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """What is to be written has filled the buffers."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        _cancel(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the times."""
        super().connection_lost(exc)
        _cancel(self._headers)
        _cancel(self._stalled)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
