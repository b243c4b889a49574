"""The HTTP service: the interface of NeMo-Skills' local sandbox, so that its client works unchanged.

`POST /execute` (header X-Session-ID), `GET /sessions`, `DELETE /sessions/{id}`, `GET /health`.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from fourfold.errors import FourfoldError
from fourfold.listening import is_loopback, listen
from fourfold.progress import logger
from fourfold.sandbox.policy import Policy
from fourfold.sandbox.pool import Pool, PoolFull, PoolSettings
from fourfold.sandbox.selftest import check_isolation, require_isolation
from fourfold.sandbox.worker import KEEP_BYTES, CellResult, StartError

MAX_BODY_BYTES = 1 << 20
MAX_SECONDS = 60.0
CUT = "<output cut>"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class ExecuteRequest(BaseModel):
    """The body of `POST /execute`; the names are NeMo-Skills'.

    `ipython` runs a cell in the session, `python` a program of its own. `timeout` is in seconds of wall time; more than
    60 counts as 60. A stream with more than `max_output_characters` is cut and ends with `<output cut>`.
    """

    generated_code: str
    timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    language: Literal["ipython", "python"] = "ipython"
    std_input: str = ""
    max_output_characters: int = Field(1000, ge=0)
    traceback_verbosity: Literal["Plain", "Minimal", "Context", "Verbose"] = "Plain"


def make_app(
    policy: Policy, isolation: dict[str, object], settings: PoolSettings, api_key: str = "", admin_key: str = ""
) -> FastAPI:
    """The application, for a policy that `check_isolation` has tried; `isolation` is what that found.

    With `admin_key`, it alone shows the sessions' names: who knows a session's name can use it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.pool = Pool(policy, settings)
        try:
            await app.state.pool.open()
            yield
        finally:
            await app.state.pool.close()

    app = FastAPI(title="fourfold sandbox", lifespan=lifespan, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").encode()
        lists = admin_key and request.url.path == "/sessions"
        key = admin_key if lists else api_key
        if key and request.url.path != "/health" and not secrets.compare_digest(given, f"Bearer {key}".encode()):
            return _error(401, f"send the service's {'admin' if lists else 'API'} key: Authorization: Bearer KEY")
        # Read here, so that a body without a stated length is bounded too.
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return _error(413, f"the body has more than {MAX_BODY_BYTES} bytes")
        request._body = bytes(body)
        return await go_on(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'body'}: {first['msg']}")

    @app.exception_handler(PoolFull)
    async def full(request: Request, error: PoolFull) -> Response:
        return _error(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(StartError)
    async def not_started(request: Request, error: StartError) -> Response:
        return _error(503, f"the sandbox did not start: {error}", {"Retry-After": "1"})

    @app.post("/execute")
    async def execute(body: ExecuteRequest, x_session_id: Annotated[str | None, Header()] = None) -> Response:
        pool: Pool = app.state.pool
        limits: dict[str, Any] = {
            "timeout": min(body.timeout, MAX_SECONDS),
            "stdin": body.std_input,
            "minimal": body.traceback_verbosity == "Minimal",
        }
        if body.language == "python":
            result, new = await pool.run_once(body.generated_code, **limits), True
        elif x_session_id is None or not _NAME.fullmatch(x_session_id):
            return _error(400, "X-Session-ID: a session's name is needed, 1 to 128 letters, digits, '-' or '_'")
        else:
            result, new = await pool.run(x_session_id, body.generated_code, **limits)
        return JSONResponse(_answer(result, new, body.max_output_characters))

    @app.get("/sessions")
    async def sessions() -> dict[str, Any]:
        found = {
            name: {
                "backend": "ipython",
                "created": session.created,
                "last_used": session.last_used,
                "alive": session.worker.is_alive(),
            }
            for name, session in app.state.pool.sessions.items()
        }
        return {"sessions": found, "backend": "ipython"}

    @app.delete("/sessions/{name}")
    async def delete(name: str) -> Response:
        if not await app.state.pool.delete(name):
            return _error(404, f"session {name} not found")
        return JSONResponse({"message": f"session {name} deleted"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        pool: Pool = app.state.pool
        counts = {"sessions": len(pool.sessions), "ready": pool.ready, "max_sessions": settings.max_sessions}
        return {"status": "healthy", **counts, "isolation": isolation}

    return app


def _answer(result: CellResult, new: bool, most: int) -> dict[str, Any]:
    return {
        "process_status": result.status,
        "stdout": _cut(result.stdout, most),
        "stderr": _cut(result.stderr, most),
        "new_session_created": new,
        "session_alive": result.alive,
        "seconds": round(result.seconds, 6),
    }


def _cut(text: str, most: int) -> str:
    most = min(most, KEEP_BYTES)
    return text if len(text) <= most else text[:most] + CUT


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)


def serve(host: str, port: int, api_key: str, settings: PoolSettings, admin_key: str = "") -> None:
    """Runs the service until SIGTERM or SIGINT.

    Raises SandboxUnavailable where the isolation cannot be had, FourfoldError for an address that needs a key or is
    taken.
    """
    if not api_key and not is_loopback(host):
        raise FourfoldError(f"--host: {host} can be reached from other machines; give an --api-key")
    policy = require_isolation()
    isolation = asyncio.run(check_isolation(policy))
    listener = listen(host, port)
    config = uvicorn.Config(
        make_app(policy, isolation, settings, api_key, admin_key),
        log_level="warning",
        h11_max_incomplete_event_size=16 << 10,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=256,
    )
    logger.info("sandbox: listening on http://%s:%d", host, listener.getsockname()[1])
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
