"""Runs the server: address, key, signals, start and end."""

import gc
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import uvicorn

from fourfold.artifacts import read_manifest
from fourfold.engine import load_engine
from fourfold.errors import FourfoldError
from fourfold.listening import is_loopback, listen
from fourfold.progress import logger
from fourfold.server.app import create_app
from fourfold.server.async_engine import AsyncEngine
from fourfold.server.connection import HEADER_BYTES, Connection
from fourfold.server.guard import Limits
from fourfold.server.service import Service

MAX_CONNECTIONS = 1000
KEEP_ALIVE_SECONDS = 30


def serve(
    directory: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    served_model_name: str | None,
    max_waiting: int,
    drain_seconds: int,
    limits: Limits,
    device: str,
    enable_prefix_caching: bool,
) -> None:
    """Serves an engine until SIGTERM or SIGINT; then ends what runs, and returns.

    Args:
        directory: the engine.
        host: address to listen on; one that others can reach needs a key.
        port: 0 takes any that is free.
        api_key: what clients must send as a bearer token; None lets all in.
        served_model_name: the model's name for clients; None takes the directory's.
        max_waiting: requests that may wait for a slot.
        drain_seconds: how long running requests may take to end after the signal.
        limits: what a request may take.
        device: auto, cpu or cuda.
        enable_prefix_caching: keep what ended requests left in the cache for prompts that begin alike.
    Raises FourfoldError when the engine, the address or the key is not fit, and what ended the engine if it fails.
    """
    read_manifest(directory / "manifest.json", "build_engine")
    check_access(host, api_key)
    name = served_model_name or directory.absolute().name
    engine = AsyncEngine(lambda: load_engine(directory, device, enable_prefix_caching), name, max_waiting)
    service = Service(engine, name, directory)
    listener = listen(host, port)
    address, at = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address

    def ready() -> None:
        # What has been loaded stays: looking through it for garbage would hold up all requests.
        gc.collect()
        gc.freeze()
        logger.info("%s is ready on http://%s:%d/v1", name, shown, at)

    server = make_server(
        service,
        limits=limits,
        api_key=api_key,
        drain_seconds=drain_seconds,
        on_ready=ready,
    )
    _share_logging()
    # uvicorn sends itself the signal again when it has stopped: by then it has been heeded.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    if engine.error is not None:
        raise engine.error


def make_server(
    service: Service, *, limits: Limits, api_key: str | None, drain_seconds: int, on_ready: Callable[[], None]
) -> uvicorn.Server:
    """The server, not yet running; it stops when its `should_exit` is set, or by itself when the engine fails."""

    def stop() -> None:
        server.should_exit = True

    config = uvicorn.Config(
        create_app(service, limits, api_key, on_ready, stop),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    server = uvicorn.Server(config)
    service.stopping = lambda: server.should_exit
    return server


def check_access(host: str, api_key: str | None) -> None:
    """Raises FourfoldError for a key that no header can carry, and for none where others can reach the address."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise FourfoldError("--api-key: give printable ASCII characters without spaces around them")
    if api_key is None and not is_loopback(host):
        raise FourfoldError(
            f"--host {host} can be reached from other machines: set a key with --api-key or FOURFOLD_API_KEY, "
            "or listen on 127.0.0.1"
        )


def _share_logging() -> None:
    """uvicorn's warnings and errors go where ours go; its chatter about connections does not."""
    theirs = logging.getLogger("uvicorn.error")
    theirs.handlers, theirs.propagate = list(logger.handlers), False
    theirs.setLevel(logging.WARNING)
