"""A client of the sandbox: one session, which lives as long as its block."""

import asyncio
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

from fourfold.client.http import CONNECT_SECONDS, describe, http_client
from fourfold.errors import FourfoldError

CUT = "<output cut>"
GRACE_SECONDS = 30.0
"""How much longer than the cell's own limit an answer may take: the cells of others come first."""
CANCELLED_TRIES = 20
"""How often, ten times a second, the session of a cancelled cell is ended."""
FULL_SECONDS = 600.0
"""How long a full service is asked again."""


@dataclass(frozen=True)
class CellOutput:
    """What a cell came to. Texts are as the cell printed them, cut to the limit."""

    status: str
    """completed, error, timeout, or another of the service's."""
    stdout: str
    stderr: str
    new_session: bool
    """Whether the session was made for this cell: nothing of cells before it is there."""


class SandboxSession:
    """A session of its own at a sandbox with NeMo-Skills' interface: ours, or theirs."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Connects to nothing yet; the first cell makes the session.

        Args:
            base_url: the service's address.
            api_key: sent as a bearer token.
        """
        self.base_url = base_url.rstrip("/")
        # Nobody else can guess it, so nobody else can run cells in this session.
        self._headers = {"X-Session-ID": uuid.uuid4().hex}
        self._running = False
        self._http = http_client(self.base_url, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            # A cell that was cancelled may yet make its session.
            for _ in range(CANCELLED_TRIES if self._running else 1):
                path = f"/sessions/{self._headers['X-Session-ID']}"
                if (await self._http.delete(path, timeout=CONNECT_SECONDS)).is_success:
                    break
                await asyncio.sleep(0.1 * self._running)
        except httpx2.HTTPError:
            pass  # the service ends sessions that nobody uses
        finally:
            await self._http.aclose()

    async def run(self, code: str, seconds: float, most_characters: int) -> CellOutput:
        """Runs a cell; waits for a place while the service is full.

        Args:
            code: Python.
            seconds: how long it may run.
            most_characters: of each stream; what is cut ends with `<output cut>`.
        Raises FourfoldError when the service does not run it.
        """
        body = {
            "generated_code": code,
            "timeout": seconds,
            "language": "ipython",
            "max_output_characters": most_characters,
        }
        self._running = True
        end = asyncio.get_running_loop().time() + FULL_SECONDS
        try:
            while True:
                timeout = httpx2.Timeout(seconds + GRACE_SECONDS, connect=CONNECT_SECONDS)
                response = await self._http.post("/execute", json=body, headers=self._headers, timeout=timeout)
                if response.status_code not in (429, 503) or asyncio.get_running_loop().time() > end:
                    break
                await asyncio.sleep(1)
            self._running = False
            result: dict[str, Any] = response.raise_for_status().json()
            return CellOutput(
                str(result["process_status"]),
                _cut(str(result["stdout"]), most_characters),
                _cut(str(result["stderr"]), most_characters),
                bool(result.get("new_session_created")),
            )
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(
                f"{self.base_url}/execute: the sandbox does not run code ({describe(error)}); "
                "start one with `fourfold sandbox`"
            ) from None


def _cut(text: str, most: int) -> str:
    """A service may have another limit of its own."""
    return text if len(text) <= most + len(CUT) else text[:most] + CUT
