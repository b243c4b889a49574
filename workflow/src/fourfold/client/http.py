"""What all clients of a server have in common."""

import httpx2

CONNECT_SECONDS = 10.0


class Refused(Exception):
    """The server did not answer the request; the text says why."""


def http_client(base_url: str, api_key: str | None) -> httpx2.AsyncClient:
    """A client of one server; connects to nothing yet. An answer may take as long as it likes.

    Args:
        base_url: the server's address.
        api_key: sent as a bearer token, if there is one.
    """
    return httpx2.AsyncClient(
        base_url=base_url,
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        # As many connections as there are requests.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        # The machine's proxy is not asked for a server that is to be measured.
        trust_env=False,
    )


def describe(error: Exception) -> str:
    """An error in one line; httpx's time-outs have no text of their own."""
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}".rstrip(": ")
