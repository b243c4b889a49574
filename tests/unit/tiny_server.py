"""A real server on a real socket of this machine, in a thread of the test's process, over a tiny random engine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI
from tiny_models import tiny_drafter

from fourfold.config.model import TinyModel
from fourfold.engine import LLMEngine
from fourfold.model.tiny import make_tiny
from fourfold.model.tokenizer import load_tokenizer
from fourfold.modeling.checkpoint import load_transformer
from fourfold.server.async_engine import AsyncEngine
from fourfold.server.guard import Limits
from fourfold.server.serve import listen, make_server
from fourfold.server.service import Service

MODEL = "tiny"
VOCABULARY = 512


def byte_engine(folder: Path, drafting: bool = True, **options: Any) -> LLMEngine:
    """An engine over a random model with a byte-level tokenizer and a chat template; its text is any bytes at all."""
    if not (folder / "config.json").exists():
        make_tiny(TinyModel(source="tiny"), folder)
    target = load_transformer(folder, "cpu")
    drafter = tiny_drafter(target, 0) if drafting else None
    options = {"max_num_seqs": 8, "max_model_len": 512, **options}
    return LLMEngine(target, load_tokenizer(folder), end_token_ids=(2,), drafter=drafter, **options)


@dataclass
class TinyServer:
    """A running server, from inside and outside."""

    url: str
    engine: AsyncEngine
    stop: Callable[[], None]
    """Asks it to stop, as SIGTERM does."""
    connections: Callable[[], int]
    """How many connections are open."""

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self.engine.engine.num_running

    def http(self, **options: Any) -> httpx2.Client:
        """Raw HTTP."""
        return httpx2.Client(base_url=self.url, **{"timeout": 60, **options})

    def openai(self, api_key: str = "none") -> OpenAI:
        """OpenAI's own client, which shall show errors rather than ask again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """One request."""
        with self.http() as client:
            return client.post(path, json=body)


@contextmanager
def tiny_server(
    load: Callable[[], LLMEngine],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    max_waiting: int = 64,
    wait: bool = True,
    root: Path = Path(),
) -> Iterator[TinyServer]:
    """Serves an engine until the block ends; with `wait`, from when it is ready."""
    engine = AsyncEngine(load, MODEL, max_waiting)
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    service = Service(engine, MODEL, root)
    server = make_server(service, limits=limits or Limits(), api_key=api_key, drain_seconds=20, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = True

    def connections() -> int:
        return len(server.server_state.connections)

    try:
        if wait:
            assert ready.wait(60)
        yield TinyServer(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, stop, connections)
    finally:
        stop()
        thread.join(60)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Waits until it holds and returns how long that took. Raises AssertionError when it never does."""
    begin = time.perf_counter()
    while not condition():
        assert time.perf_counter() - begin < seconds, "it did not come about in time"
        time.sleep(0.002)
    return time.perf_counter() - begin
