"""From start to end: readiness, disconnects, a full queue, draining, failures, keys and limits."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tiny_chain import shared_chain
from tiny_server import MODEL, TinyServer, byte_engine, tiny_server, until

from fourfold.engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.server import connection
from fourfold.server.guard import Limits
from fourfold.server.serve import check_access, listen

STEP = 0.05
LONG: dict[str, Any] = {"model": MODEL, "prompt": "Ada", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
FOURFOLD = str(Path(sys.executable).with_name("fourfold"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def slow_engine(folder: Path, **options: Any) -> LLMEngine:
    """An engine whose steps take STEP seconds or more: a request of LONG would take many seconds."""
    engine = byte_engine(folder, **options)
    step = engine.step

    def slowly() -> Any:
        time.sleep(STEP)
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    return engine


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[TinyServer]:
    with tiny_server(lambda: slow_engine(folder, max_num_seqs=2), max_waiting=2) as running:
        yield running


def ask(server: TinyServer, **body: Any) -> socket.socket:
    """Sends a request and returns its open socket."""
    content = json.dumps({**LONG, **body}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    client = socket.create_connection((host, int(port)), timeout=10)
    # A small one, so that the server notices soon when nothing is read.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot_within_a_step(slow: TinyServer, stream: bool) -> None:
    client = ask(slow, stream=stream)
    until(lambda: slow.running == 1, 5)
    client.close()
    # One step may have begun before the client went, another before the engine was told.
    assert until(lambda: slow.running == 0, 5) < 3 * STEP + 0.2
    assert slow.post("/v1/completions", **{**LONG, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_it_waits_leaves_the_queue(slow: TinyServer, stream: bool) -> None:
    running = [ask(slow, stream=True) for _ in range(2)]
    until(lambda: slow.running == 2, 5)
    waiting = ask(slow, stream=stream)
    until(lambda: slow.engine.engine.num_waiting == 1, 5)
    waiting.close()
    until(lambda: slow.engine.engine.num_waiting == 0, 2)
    assert slow.running == 2
    for client in running:
        client.close()
    until(lambda: slow.running == 0, 5)


def test_choices_of_one_call_end_together(slow: TinyServer) -> None:
    client = ask(slow, n=2, stream=True)
    until(lambda: slow.running == 2, 5)
    client.close()
    until(lambda: slow.running == 0, 2)


def test_a_full_queue_is_said_and_ends(slow: TinyServer) -> None:
    clients = [ask(slow, stream=True) for _ in range(4)]
    until(lambda: slow.running == 2 and slow.engine.engine.num_waiting == 2, 5)
    refused = slow.post("/v1/completions", **LONG)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "vllm:num_requests_waiting" in (text := slow.http().get("/metrics").text)
    assert f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 2.0' in text
    for client in clients:
        client.close()
    until(lambda: slow.running == 0 and slow.engine.engine.num_waiting == 0, 5)
    assert slow.post("/v1/completions", **{**LONG, "max_tokens": 2}).status_code == 200


def test_the_first_token_is_sent_when_it_is_there(slow: TinyServer) -> None:
    with slow.http() as client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        assert slow.running == 1, "the first event came after the last token"
    until(lambda: slow.running == 0, 5)


def test_health_says_when_it_is_ready(folder: Path) -> None:
    go = threading.Event()

    def load() -> LLMEngine:
        assert go.wait(30)
        return byte_engine(folder)

    with tiny_server(load, wait=False) as server:
        for path in ("/health", "/v1/models"):
            response = server.http().get(path)
            assert response.status_code == 503
            assert "loading" in response.json()["error"]["message"]
        assert server.post("/v1/completions", **LONG).status_code == 503
        go.set()
        until(lambda: server.http().get("/health").status_code == 200, 30)
        server.stop()
        until(lambda: not server.engine._thread.is_alive(), 10)


def test_a_step_that_fails_is_an_error_and_ends_the_server(folder: Path) -> None:
    broken = threading.Event()

    def load() -> LLMEngine:
        engine = slow_engine(folder)
        step = engine.step

        def fail() -> Any:
            if broken.is_set():
                raise RuntimeError("the device is lost")
            return step()

        engine.step = fail  # type: ignore[method-assign]
        return engine

    with tiny_server(load) as server:
        client = ask(server, stream=True)
        until(lambda: server.running == 1, 5)
        broken.set()
        said = received(client)
        assert b'"server_error"' in said
        assert b"the engine has failed" in said
        assert said.rstrip(b"\r\n0").endswith(b"data: [DONE]")
        assert isinstance(server.engine.error, RuntimeError)
        until(lambda: refuses_connections(server), 10)


def refuses_connections(server: TinyServer) -> bool:
    try:
        server.http(timeout=1).get("/health")
    except httpx2.TransportError:
        return True
    return False


def test_a_key_is_needed_where_one_is_set(folder: Path) -> None:
    with tiny_server(lambda: byte_engine(folder), api_key="right") as server:
        body = {**LONG, "max_tokens": 2}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Basic right"},
        ):
            response = server.http(headers=headers).post("/v1/completions", json=body)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
            assert server.http().get(path).status_code == 401
        assert server.http().get("/health").status_code == 200
        body = {"model": MODEL, "prompt": "Ada", "max_tokens": 2}
        assert server.openai("right").completions.create(**body).usage is not None  # type: ignore[call-overload]


def raw(server: TinyServer, content: bytes, pause: Callable[[socket.socket], None] = lambda _: None) -> bytes:
    """What comes back for some bytes, until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(content)
        pause(client)
        return received(client)


def received(client: socket.socket) -> bytes:
    """All that the server sends until it closes or cuts the connection."""
    answer = b""
    try:
        while chunk := client.recv(65536):
            answer += chunk
    except ConnectionResetError:
        pass
    return answer


def test_sizes_and_times_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    limits = Limits(body_bytes=2000, body_seconds=0.3, request_seconds=1)
    with tiny_server(lambda: slow_engine(folder), limits=limits) as server:
        large = server.post("/v1/completions", **{**LONG, "prompt": "a" * 3000})
        assert large.status_code == 413
        assert "2000 bytes" in large.json()["error"]["message"]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"a" * 1000 + b"\r\n"
        assert raw(server, chunked + b"3e9\r\n" + b"a" * 1001 + b"\r\n").startswith(b"HTTP/1.1 413")
        assert raw(server, head + b"Content-Length: 5\r\n\r\n{").startswith(b"HTTP/1.1 408")
        assert raw(server, b"GET /" + b"a" * 20_000).startswith(b"HTTP/1.1 400")

        def drip(client: socket.socket) -> None:
            for _ in range(5):
                time.sleep(0.1)
                try:
                    client.sendall(b"X: a\r\n")
                except (BrokenPipeError, ConnectionResetError):
                    return

        begin = time.perf_counter()
        assert raw(server, b"GET /health HTTP/1.1\r\n", drip) == b""
        assert raw(server, b"") == b""
        assert time.perf_counter() - begin < 2
        slow = server.post("/v1/completions", **LONG)
        assert slow.status_code == 504
        assert "1 s" in slow.json()["error"]["message"]
        with pytest.raises(httpx2.TransportError):
            server.post("/v1/completions", **LONG, stream=True)
        until(lambda: server.running == 0, 2)


def test_a_reader_that_stalls_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.3)
    with tiny_server(lambda: byte_engine(folder)) as server:
        # Probabilities make the answer larger than what the sockets' buffers hold.
        stalled = ask(server, prompt=[list(range(3, 503))] * 30, max_tokens=1, echo=True, logprobs=20)
        until(lambda: len(server.engine._open) > 0, 5)
        until(lambda: not server.engine._open, 20)
        assert server.post("/v1/completions", **{**LONG, "max_tokens": 5}).status_code == 200
        # One that has read its answer would be kept for another request.
        until(lambda: server.connections() == 0, 5)
        stalled.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory) / "engines" / "bf16-redrafter"


def test_the_command_serves_what_the_workflow_built_and_drains(built: Path) -> None:
    environment = {**os.environ, "FOURFOLD_API_KEY": "secret"}
    command = [FOURFOLD, "serve", str(built), "--port", "0", "--host", "0.0.0.0", "--device", "cpu"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "is ready on" in line)
        url = line.split()[-1].replace("0.0.0.0", "127.0.0.1").removesuffix("/v1")
        body = {"prompt": "Ada has", "max_tokens": 120, "ignore_eos": True, "stream": True, "temperature": 0}
        headers = {"Authorization": "Bearer secret"}
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "bf16-redrafter"
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                said = [first, *lines]
        assert [text for text in said if text][-1] == "data: [DONE]"
        assert json.loads([text for text in said if text][-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/health")
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


def test_other_addresses_need_a_key() -> None:
    check_access("127.0.0.1", None)
    check_access("::1", None)
    check_access("localhost", None)
    check_access("0.0.0.0", "key")
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(FourfoldError, match="set a key with --api-key or FOURFOLD_API_KEY"):
            check_access(host, None)
    for key in ("", " key", "schlüssel", "a\nb"):
        with pytest.raises(FourfoldError, match="printable ASCII"):
            check_access("127.0.0.1", key)
    with listen("127.0.0.1", 0) as taken, pytest.raises(FourfoldError, match="choose another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
