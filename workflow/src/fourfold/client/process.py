"""A server in a process of its own, for as long as a block runs: started, waited for, and ended whatever happens."""

import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import httpx2

from fourfold.errors import FourfoldError

HOST = "127.0.0.1"
POLL_SECONDS = 0.05
START_SECONDS = 3600.0
"""How long a server may take to load; one that fails meanwhile is not waited for."""
STOP_SECONDS = 20.0
"""How long a server may take to end after SIGTERM, before it is killed."""
LAST_WORDS = 3000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class ServerProcess:
    """A server that was started here."""

    url: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    """What it prints."""
    start_seconds: float = 0.0
    """From its start until it was ready."""

    def check_alive(self) -> None:
        """Raises FourfoldError with the server's last words if it has ended."""
        if self.process.poll() is not None:
            raise FourfoldError(f"the server has ended with code {self.process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of what it printed: the line of its error, if there is one."""
        size = os.fstat(self.output.fileno()).st_size
        text = os.pread(self.output.fileno(), LAST_WORDS, max(0, size - LAST_WORDS)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it printed nothing"])[-1]

    def stop(self) -> None:
        """Ends it and all that it has started: by SIGTERM, and by SIGKILL if that is not heeded; does nothing twice."""
        if self.process.returncode is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        # It leads a group of its own, in which workers may be left.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running_server(command: Sequence[str], port: int, start_seconds: float = START_SECONDS) -> Iterator[ServerProcess]:
    """Starts a server and ends it with the block, also after an error or Ctrl-C; the block begins once it is healthy.

    A server never outlives this process: if that is killed, the kernel ends the server.

    Args:
        command: what starts it.
        port: where it will listen, on 127.0.0.1.
        start_seconds: how long it may take until /health says 200.
    Raises FourfoldError when it ends or is not ready by then.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this process, which ends the server in its turn.
            start_new_session=True,
            preexec_fn=_end_with(os.getpid()),
        )
        server = ServerProcess(f"http://{HOST}:{port}", process, output)
        begin = time.monotonic()
        try:
            _wait(server, start_seconds)
            server.start_seconds = time.monotonic() - begin
            yield server
        finally:
            server.stop()


def _end_with(parent: int) -> Callable[[], None]:
    """What makes a child end when its parent does, in whatever way. Runs in the child, where little is safe to do."""

    def end_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent has ended before it was asked for

    return end_with_parent


def _wait(server: ServerProcess, seconds: float) -> None:
    """Waits until the server is healthy. Raises FourfoldError."""
    end = time.monotonic() + seconds
    with httpx2.Client(base_url=server.url, timeout=5, trust_env=False) as http:
        while time.monotonic() < end:
            server.check_alive()
            try:
                if http.get("/health").is_success:
                    return
            except httpx2.TransportError:
                pass  # it does not listen yet
            time.sleep(POLL_SECONDS)
    raise FourfoldError(f"the server was not ready after {seconds:g} s; its last words: {server.last_words()}")
