"""Runs one workload through a client and says what came of each request."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fourfold.benchmark.workload import PlannedRequest, Workload
from fourfold.client.api import ApiClient, Completion

Ask = Callable[[PlannedRequest, Completion], Awaitable[None]]
"""Gets the answer to a request and fills it in as it comes."""


@dataclass
class RequestRun:
    """A request and what the client saw of it."""

    planned: PlannedRequest
    answer: Completion = field(default_factory=Completion)

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.answer.finished


@dataclass
class WorkloadRun:
    """A workload's requests and its time from the first submission to the stop, in seconds."""

    workload: Workload
    requests: list[RequestRun]
    total_generation_time: float

    @property
    def output_tokens(self) -> int:
        """Tokens received until the stop, those of cancelled requests included."""
        return sum(run.answer.times.tokens for run in self.requests)

    @property
    def failures(self) -> list[str]:
        """What went wrong, one for each request that failed."""
        return [run.answer.error for run in self.requests if run.answer.error is not None]


def completions(client: ApiClient, model: str, prompts: dict[str, list[int]]) -> Ask:
    """Asks a server's model for one completion of each problem's prompt; `prompts` are token ids by problem id."""

    async def ask(planned: PlannedRequest, answer: Completion) -> None:
        await client.complete(model, prompts[planned.problem.id], planned.params, answer)

    return ask


async def run_workload(
    ask: Ask, workload: Workload, keep_first: int | None = None, max_seconds: float | None = None
) -> WorkloadRun:
    """Sends the requests as the workload's load says, stops after `keep_first` have finished or `max_seconds`.

    Those that have not ended by then are cancelled. A request that fails counts as ended.

    Args:
        ask: answers one request; the server should have no others.
        workload: what to run.
        keep_first: stop when this many have finished; None waits for all.
        max_seconds: stop after this long; None never does.
    """
    wanted = min(keep_first or len(workload.requests), len(workload.requests))
    runs = [RequestRun(planned) for planned in workload.requests]
    slots = asyncio.Semaphore(workload.load.concurrency or len(runs))
    start = time.perf_counter()

    async def send(run: RequestRun) -> None:
        await asyncio.sleep(start + run.planned.arrival - time.perf_counter())
        async with slots:
            await ask(run.planned, run.answer)

    tasks = [asyncio.create_task(send(run)) for run in runs]
    try:
        await _until(tasks, wanted, None if max_seconds is None else start + max_seconds)
    finally:
        total = time.perf_counter() - start
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    for run in runs:
        if run.answer.finish_reason is None:
            run.answer.finish_reason = "cancelled"
    return WorkloadRun(workload, runs, total)


async def _until(tasks: list["asyncio.Task[None]"], wanted: int, end: float | None) -> None:
    """Waits until `wanted` of the tasks have ended, or the time has come."""
    pending = set(tasks)
    while len(tasks) - len(pending) < wanted:
        left = None if end is None else end - time.perf_counter()
        if left is not None and left <= 0:
            return
        _, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
