"""A server's process: it is waited for, its last words are told, and it never outlives who started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from fourfold.client.process import free_port, running_server
from fourfold.errors import FourfoldError

SERVER = """
import http.server, os, signal, subprocess, sys, time
port, heeds = int(sys.argv[1]), sys.argv[2] == "heeds"
if not heeds:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"])
open(sys.argv[3], "w").write(f"{os.getpid()} {worker.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    begin = time.monotonic()
    def do_GET(self):
        ready = time.monotonic() - self.begin > 0.3
        self.send_response(200 if ready else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PARENT = """
import signal, sys, time
from fourfold.client.process import running_server
# A shell that runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with running_server(sys.argv[2:], int(sys.argv[1]), 20):
        print("ready", flush=True)
        time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def command(port: int, pids: Path, manners: str = "heeds") -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), manners, str(pids)]


def ended(pids: Path, seconds: float = 5.0) -> bool:
    """Whether the server and its worker end within some time."""
    numbers = [int(number) for number in pids.read_text().split()]
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE for n in numbers):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_the_block_begins_when_it_is_healthy_and_ends_it(tmp_path: Path) -> None:
    port = free_port()
    with running_server(command(port, tmp_path / "pids"), port) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        server.check_alive()
        server.stop()
        assert ended(tmp_path / "pids")
        with pytest.raises(FourfoldError, match="the server has ended with code -15"):
            server.check_alive()


def test_an_error_in_the_block_ends_it(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(ZeroDivisionError), running_server(command(port, tmp_path / "pids"), port):
        raise ZeroDivisionError
    assert ended(tmp_path / "pids")


def test_one_that_does_not_heed_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourfold.client.process.STOP_SECONDS", 0.2)
    port = free_port()
    with running_server(command(port, tmp_path / "pids", "ignores"), port) as server:
        pass
    assert server.process.returncode == -signal.SIGKILL
    assert ended(tmp_path / "pids")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, ""), (signal.SIGKILL, "")]
)
def test_it_ends_with_whoever_started_it(tmp_path: Path, number: signal.Signals, said: str) -> None:
    """After Ctrl-C its workers end too; after a kill, the server itself: nothing is left to end the others."""
    port, pids = free_port(), tmp_path / "pids"
    arguments = [sys.executable, "-c", PARENT, str(port), *command(port, pids)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        assert parent.stdout.read().strip() == said
    _, worker = map(int, pids.read_text().split())
    if number != signal.SIGINT:
        os.kill(worker, signal.SIGKILL)
    assert ended(pids)


def test_last_words_are_told(tmp_path: Path) -> None:
    script = "import sys; print('loading'); sys.exit('error: the checkpoint is cut; make it again')"
    with (
        pytest.raises(FourfoldError, match=r"ended with code 1: the checkpoint is cut; make it again"),
        running_server([sys.executable, "-c", script], free_port()),
    ):
        raise AssertionError("it never was ready")


def test_one_that_never_is_ready_is_not_waited_for(tmp_path: Path) -> None:
    script = "import time; print('still loading', flush=True); time.sleep(600)"
    with (
        pytest.raises(FourfoldError, match=r"not ready after 0\.5 s; its last words: still loading"),
        running_server([sys.executable, "-c", script], free_port(), 0.5),
    ):
        raise AssertionError("it never was ready")
