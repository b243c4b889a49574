"""One sandboxed Python process: started, given cells, killed and reaped. Facts about a cell are decided here.

The process inside is not believed: that a cell completed is its claim, and all that it can lie about. That it ran out
of time, died, wrote too much or broke the protocol is what this side observed.
"""

import asyncio
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fourfold.progress import logger
from fourfold.sandbox.policy import Policy

Status = Literal["completed", "error", "timeout", "died", "output_limit", "protocol"]
KEEP_BYTES = 64 << 10
KILL_BYTES = 64 << 20
FRAME_BYTES = 4096
START_SECONDS = 60.0
GRACE_SECONDS = 0.5
_CHUNK = 64 << 10
_LAUNCHER = Path(__file__).with_name("launcher.py")


class StartError(Exception):
    """A sandbox did not start; the text is what it said."""


@dataclass(frozen=True)
class CellResult:
    """What a cell did.

    Attributes:
        status: `completed` and `error` are what the cell's process claims; the others are facts.
        stdout, stderr: decoded, undecodable bytes replaced; the first 64 KiB of each.
        seconds: wall time.
        alive: whether the session's state is still there.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float
    alive: bool


class _Output:
    """The bytes of one stream: the first are kept, all are counted."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.kept = bytearray()
        self.count = 0

    def read(self) -> bool:
        """Takes what is there, at most a chunk; false at the end or when there is nothing now."""
        try:
            part = os.read(self.pipe, _CHUNK)
        except BlockingIOError:
            return False
        self.count += len(part)
        self.kept += part[: KEEP_BYTES - len(self.kept)]
        return bool(part)

    def take(self) -> str:
        text = self.kept.decode("utf-8", "replace")
        self.kept, self.count = bytearray(), 0
        return text


class Worker:
    """A sandbox with a running Python. Made by `start`; belongs to one session and is never used for another."""

    def __init__(self, slot: int, process: subprocess.Popen[bytes], control: socket.socket, status: int) -> None:
        self.slot = slot
        self.process = process
        self.python = 0  # process id on this machine
        self._control = control
        self._status = status
        self._pids = [os.pidfd_open(process.pid)]  # of bubblewrap, the namespace's init, and Python
        assert process.stdout is not None
        assert process.stderr is not None
        self._outputs = _Output(process.stdout.fileno()), _Output(process.stderr.fileno())
        self._frame = bytearray()
        self._cell, self._end = asyncio.Lock(), asyncio.Lock()
        for output in self._outputs:
            os.set_blocking(output.pipe, False)
        control.setblocking(False)
        os.set_blocking(status, False)

    @classmethod
    async def start(cls, policy: Policy, slot: int) -> "Worker":
        """Starts a sandbox and waits until it is ready. Raises StartError."""
        become_subreaper()
        ours, theirs = socket.socketpair()
        status, status_end = os.pipe()
        plan = json.dumps(policy.plan(slot, theirs.fileno(), status_end))
        try:
            # From the loop's thread, which lives as long as the service: bubblewrap dies with the thread that made it.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), plan],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(theirs.fileno(), status_end),
                env={},
            )
        except OSError:
            ours.close()
            os.close(status)
            raise
        finally:
            theirs.close()
            os.close(status_end)
        worker = cls(slot, process, ours, status)
        # Half-way, there are processes that only bubblewrap knows: whoever gives up waits until it has named them.
        becoming = asyncio.ensure_future(worker._become_ready())
        try:
            await asyncio.shield(becoming)
        except BaseException:
            await asyncio.wait([becoming])
            await worker.kill()
            raise
        return worker

    async def _become_ready(self) -> None:
        end = await self._watch("ready", START_SECONDS)
        with suppress(OSError, ValueError, IndexError):
            # One JSON object a line; the first names the namespace's init by its number on this machine.
            init = int(json.loads(os.read(self._status, _CHUNK).splitlines()[0])["child-pid"])
            self._pids.append(os.pidfd_open(init))
            self.python = int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])
            self._pids.append(os.pidfd_open(self.python))
            if end == "completed":
                return
        said = " ".join("".join(output.take() for output in self._outputs).split())
        raise StartError(said[-500:] or f"the sandbox did not start ({end})")

    async def run(
        self, code: str, *, timeout: float, stdin: str = "", interactive: bool = True, minimal: bool = False
    ) -> CellResult:
        """Runs a cell.

        Args:
            code: Python source.
            timeout: seconds of wall time; then the cell is interrupted, and half a second later killed.
            stdin: what the cell may read.
            interactive: print the value of a last expression, and tracebacks to standard output.
            minimal: of an error, its last line alone.
        """
        begin = time.monotonic()
        status, alive = self._stray(), False
        if status is None:
            name = secrets.token_hex(16)
            request = {"id": name, "code": code, "stdin": stdin, "interactive": interactive, "minimal": minimal}
            async with self._cell:
                status, alive = await self._exchange(name, json.dumps(request).encode(), timeout)
        if not alive:
            await self.kill()
        fact = _FACTS.get(status, "").format(seconds=timeout)
        stdout, stderr = (output.take() for output in self._outputs)
        return CellResult(status, stdout, stderr + fact, time.monotonic() - begin, alive)

    async def _exchange(self, name: str, request: bytes, timeout: float) -> tuple[Status, bool]:
        """Sends a request and waits for what comes of it; also whether the worker can take another cell."""
        loop = asyncio.get_running_loop()
        # As a task: a guest that does not read must not hold up the clock.
        sending = loop.create_task(self._send(struct.pack(">I", len(request)) + request))
        try:
            status = await self._watch(name, timeout)
            alive = status in ("completed", "error")
            if status == "timeout":
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pids[-1], signal.SIGINT)
                # Whatever it says now, it was too late; a reply only shows that its state may be kept.
                alive = await self._watch(name, GRACE_SECONDS) in ("completed", "error")
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending
        # A thread that lives on would run, and write, outside of any cell.
        return status, alive and self._threads() == 1

    async def _send(self, data: bytes) -> None:
        with suppress(OSError):  # the end is seen on the channel
            await asyncio.get_running_loop().sock_sendall(self._control, data)

    async def _watch(self, name: str, timeout: float) -> Status:
        """Reads output and the reply until one of them decides, or until the time (seconds) is up."""
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[Status] = loop.create_future()

        def decide(status: Status | None) -> None:
            if status is not None and not decided.done():
                decided.set_result(status)

        def read(output: _Output) -> None:
            if not output.read():
                loop.remove_reader(output.pipe)  # closed: the channel tells what that means
            decide(self._too_much())

        watched = [self._control.fileno(), *(output.pipe for output in self._outputs)]
        loop.add_reader(self._control, lambda: decide(self._reply(name)))
        for output in self._outputs:
            loop.add_reader(output.pipe, read, output)
        try:
            status = await asyncio.wait_for(decided, timeout)
        except TimeoutError:
            status = "timeout"
        finally:
            for descriptor in watched:
                loop.remove_reader(descriptor)
        # The cell wrote its output before its reply, so all of it is in the pipes.
        for output in self._outputs:
            while self._too_much() is None and output.read():
                pass
        return self._too_much() or status

    def _too_much(self) -> Status | None:
        return "output_limit" if sum(output.count for output in self._outputs) > KILL_BYTES else None

    def _reply(self, name: str) -> Status | None:
        """Reads from the channel; None while the frame is not whole."""
        try:
            part = self._control.recv(FRAME_BYTES + 5)
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        if not part:
            return "died"
        self._frame += part
        status = parse_reply(bytes(self._frame), name)
        if status is not None:
            self._frame.clear()
        return status

    def _stray(self) -> Status | None:
        """What is wrong before a cell begins: nothing may have come since the last reply."""
        with suppress(BlockingIOError):
            try:
                return "protocol" if self._control.recv(1) else "died"
            except ConnectionError:
                return "died"
        for output in self._outputs:
            output.read()
        return "protocol" if any(output.count for output in self._outputs) else None

    def is_alive(self) -> bool:
        """Whether the channel is still open."""
        try:
            return self._control.fileno() >= 0 and bool(self._control.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _threads(self) -> int:
        try:
            text = Path(f"/proc/{self.python}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^Threads:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    async def kill(self) -> None:
        """Ends the sandbox with all that is in it, and reaps it. May be called again, and while a cell runs."""
        async with self._end:
            if self._control.fileno() < 0:
                return
            # The init first: with it the kernel kills all of its namespace. Left to bubblewrap, it would be orphaned.
            for pid in [*self._pids[1:2], self._pids[0]]:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pid, signal.SIGKILL)
            for pid in self._pids[:2]:
                if not await _gone(pid):
                    logger.warning("sandbox %d: a process does not end", self.slot)
            async with self._cell:  # a cell that runs sees the end of its channel first
                self._reap()

    def _reap(self) -> None:
        self.process.poll()
        if len(self._pids) > 1:
            with suppress(ChildProcessError):  # bubblewrap was quick enough to reap it
                os.waitid(os.P_PIDFD, self._pids[1], os.WEXITED | os.WNOHANG)
        for output in self._outputs:
            while self._too_much() is None and output.read():
                pass
        for pid in self._pids:
            os.close(pid)
        for stream in (self.process.stdout, self.process.stderr, self._control):
            assert stream is not None
            stream.close()
        os.close(self._status)


_FACTS: dict[str, str] = {
    "timeout": "Execution timed out after {seconds:g} seconds\n",
    "died": "The session died.\n",
    "output_limit": f"The output passed {KILL_BYTES >> 20} MiB; the session was ended.\n",
    "protocol": "The session wrote to the service's channel or outside of a cell; it was ended.\n",
}


def parse_reply(data: bytes, name: str) -> Status | None:
    """What one frame claims: 4 bytes of length (big-endian), then exactly `{"id": name, "ok": bool}` as JSON.

    None while it is not whole; `protocol` for anything else, also for bytes behind it.
    """
    if len(data) < 4:
        return None
    (size,) = struct.unpack(">I", data[:4])
    if size > FRAME_BYTES or len(data) > 4 + size:
        return "protocol"
    if len(data) < 4 + size:
        return None
    try:
        reply: Any = json.loads(data[4:])
    except (ValueError, RecursionError):
        return "protocol"
    if not isinstance(reply, dict) or reply.keys() != {"id", "ok"} or not isinstance(reply["ok"], bool):
        return "protocol"
    if reply["id"] != name:
        return "protocol"
    return "completed" if reply["ok"] else "error"


def become_subreaper() -> None:
    """Makes this process the parent of what bubblewrap leaves behind when it dies before its child."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


async def _gone(pid: int) -> bool:
    """Waits until a process (by its pidfd) has ended; false after five seconds."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pid, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), 5)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pid)
    return True
