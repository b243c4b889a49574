"""Sessions by name, each with a worker of its own, and the workers that wait for sessions to come.

A worker belongs to one session from first to last. A few are kept ready, with their libraries imported, so that a new
session starts at once.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from fourfold.errors import FourfoldError
from fourfold.progress import logger
from fourfold.sandbox.policy import MEMORY_BYTES, TMP_BYTES, Policy
from fourfold.sandbox.worker import CellResult, StartError, Worker

IDLE_SECONDS = 600.0
AGE_SECONDS = 3600.0
MAX_CELLS = 100
_MOST_SESSIONS = 64
_SWEEP_SECONDS = 5.0


class PoolFull(Exception):
    """No sandbox is free: try again later."""


@dataclass(frozen=True)
class PoolSettings:
    """How many sandboxes are kept ready, how many there may be at all, and how many cells may run at once."""

    ready: int
    max_sessions: int
    max_running: int

    @classmethod
    def for_this_machine(cls, ready: int, max_sessions: int | None, max_running: int | None) -> "PoolSettings":
        """Fills in what is not given: sessions that could all use all of their memory; a running cell a core.

        Raises FourfoldError when more are to be ready than there may be.
        """
        fit = psutil.virtual_memory().available // (MEMORY_BYTES + TMP_BYTES)
        most = max_sessions or max(2, min(_MOST_SESSIONS, fit))
        if ready > most:
            raise FourfoldError(f"--ready: {ready} sandboxes, but there may be {most} at once; raise --max-sessions")
        return cls(ready, most, max_running or len(os.sched_getaffinity(0)))


@dataclass
class Session:
    """A client's session: its worker, and what its limits count."""

    worker: Worker
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    cells: int = 0


class Pool:
    """The sessions of one service. All methods run on one event loop."""

    def __init__(self, policy: Policy, settings: PoolSettings) -> None:
        self.settings = settings
        self.sessions: dict[str, Session] = {}
        self._policy = policy
        self._ready: deque[Worker] = deque()
        self._slots = set(range(1, settings.max_sessions + 1))
        self._running = asyncio.Semaphore(settings.max_running)
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._filling: asyncio.Task[None] | None = None

    @property
    def ready(self) -> int:
        """Workers that wait for a session."""
        return sum(worker.is_alive() for worker in self._ready)

    async def open(self) -> None:
        """Starts the first workers and the clock that ends old sessions. Raises StartError."""
        while len(self._ready) < self.settings.ready:
            self._ready.append(await self._start())
        self._spawn(self._sweep())

    async def close(self) -> None:
        """Ends every sandbox."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in list(self.sessions):
            await self.delete(session)
        while self._ready:
            await self._end(self._ready.popleft())

    async def run(self, name: str, code: str, *, timeout: float, stdin: str, minimal: bool) -> tuple[CellResult, bool]:
        """Runs a cell in a named session, which is made if it is not there; also whether it was made now.

        Cells of one session run one after another. Raises PoolFull, StartError.
        """
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with lock, self._running:
                session, new = await self._session(name)
                session.cells += 1
                result = await session.worker.run(code, timeout=timeout, stdin=stdin, minimal=minimal)
                session.last_used = time.time()
                if self.sessions.get(name) is session and (not result.alive or session.cells >= MAX_CELLS):
                    await self.delete(name)
                return result, new
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]

    async def run_once(self, code: str, *, timeout: float, stdin: str, minimal: bool) -> CellResult:
        """Runs a program in a sandbox of its own. Raises PoolFull, StartError."""
        async with self._running:
            worker = await self._take()
            try:
                return await worker.run(code, timeout=timeout, stdin=stdin, interactive=False, minimal=minimal)
            finally:
                await self._end(worker)

    async def delete(self, name: str) -> bool:
        """Ends a session, also while a cell of it runs (which then died); false if there is none."""
        session = self.sessions.pop(name, None)
        if session is None:
            return False
        await self._end(session.worker)
        return True

    async def _session(self, name: str) -> tuple[Session, bool]:
        session = self.sessions.get(name)
        if session is not None and not session.worker.is_alive():
            await self.delete(name)  # it died between two cells, or the machine's memory ran out
            session = None
        if session is not None:
            return session, False
        session = self.sessions[name] = Session(await self._take())
        return session, True

    async def _take(self) -> Worker:
        while True:
            while self._ready:
                worker = self._ready.popleft()
                if worker.is_alive():
                    self._refill()
                    return worker
                await self._end(worker)
            if self._slots or self._filling is None or self._filling.done():
                break
            await asyncio.wait([self._filling])  # the last one that may be is starting
        worker = await self._start()
        self._refill()
        return worker

    async def _start(self) -> Worker:
        if not self._slots:
            raise PoolFull(f"all {self.settings.max_sessions} sandboxes are in use")
        slot = self._slots.pop()
        try:
            return await Worker.start(self._policy, slot)
        except BaseException:
            self._slots.add(slot)
            raise

    async def _end(self, worker: Worker) -> None:
        await worker.kill()
        self._slots.add(worker.slot)
        self._refill()

    def _refill(self) -> None:
        if not self._closing and (self._filling is None or self._filling.done()):
            self._filling = self._spawn(self._fill())

    async def _fill(self) -> None:
        try:
            while self._slots and len(self._ready) < self.settings.ready:
                self._ready.append(await self._start())
        except StartError as error:
            logger.warning("a sandbox did not start: %s", error)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.time()
            for name, session in list(self.sessions.items()):
                idle = now - session.last_used > IDLE_SECONDS or not session.worker.is_alive()
                if (idle and name not in self._users) or now - session.created > AGE_SECONDS:
                    await self.delete(name)
            for worker in [each for each in self._ready if not each.is_alive()]:
                self._ready.remove(worker)
                await self._end(worker)
            self._refill()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                logger.error("sandbox: %s", error)
