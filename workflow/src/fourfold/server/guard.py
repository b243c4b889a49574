"""What every request must pass before the application sees it: the key, the body's size, and time limits."""

import asyncio
import hashlib
import hmac
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.server.disconnect import ClientGone
from fourfold.server.errors import ApiError

OPEN_PATHS = {"/health"}
CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    """From the headers to the end of the body."""
    request_seconds: float = 3600
    """From the body to the end of the answer."""


class Guard:
    """ASGI middleware. Without a key, all may ask; with one, all but /health needs it."""

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        self._app, self._limits = app, limits
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers for the application what it must not see."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except ClientGone:
            pass
        else:
            await self._answer(scope, body, receive, send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        # Digests are of one length, and comparing them takes one time.
        right = hmac.compare_digest(_digest(given.strip().encode()), self._key)
        if scheme.lower() != "bearer" or not right:
            message = "this server needs its API key: send Authorization: Bearer KEY"
            more = {"WWW-Authenticate": "Bearer", **CLOSE}
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers=more)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError when it is too large or too slow, ClientGone when it never ends."""
        limit = self._limits.body_bytes
        too_large = ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {limit} bytes", headers=CLOSE
        )
        announced = headers.get("Content-Length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        body, more = b"", True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            message_text = f"the body did not arrive within {self._limits.body_seconds:g} s"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, message_text, headers=CLOSE) from None
        return body

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the application with the body that was read, for as long as a request may take."""
        read = started = False

        async def replay() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await self._app(scope, replay, watched)
        except TimeoutError:
            # An answer that has begun can only be cut: the server closes the connection.
            if not started:
                seconds = f"{self._limits.request_seconds:g}"
                error = ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"no answer within this server's limit of {seconds} s")
                await error.response()(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
