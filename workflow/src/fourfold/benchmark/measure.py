"""Runs all workloads of a benchmark against one server."""

from dataclasses import dataclass, replace

from fourfold.benchmark.memory import peak_bytes, reset_peak
from fourfold.benchmark.run import Ask, WorkloadRun, run_workload
from fourfold.benchmark.workload import Load, PlannedRequest, Workload
from fourfold.client.api import ApiClient
from fourfold.client.process import ServerProcess
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.errors import FourfoldError
from fourfold.progress import progress

WARMUP_TOKENS = 16
"""Longest answer of a warm-up request."""


@dataclass(frozen=True)
class LoadRun:
    """One load's workloads, and the server's peak memory while they ran."""

    runs: list[WorkloadRun]
    peak_memory_bytes: int | None
    """None for a server of another machine, or of someone else."""


async def measure(
    name: str,
    client: ApiClient,
    ask: Ask,
    plans: list[list[Workload]],
    settings: BenchmarkSettings,
    server: ServerProcess | None = None,
) -> list[LoadRun]:
    """Runs the workloads of all loads, one list a load, each after its warm-up.

    Args:
        name: the engine's name, for messages.
        client: of a server that is ready.
        ask: answers one request through it.
        plans: the workloads, by load.
        settings: when workloads are stopped, and the warm-up.
        server: the server's process, if it was started here.
    Raises FourfoldError when a request fails, or the server.
    """
    measured = []
    with progress(f"benchmark {name}", sum(map(len, plans)), "workloads") as task:
        for plan in plans:
            if settings.warmup_requests:
                await run_checked(ask, warmup(plan[0], settings.warmup_requests), server)
            if server is not None:
                reset_peak(server.process.pid)
            runs = []
            for workload in plan:
                # At a rate, requests are not what is stopped: those that came late would never be measured.
                keep_first = settings.keep_first if workload.load.concurrency else None
                run = await run_checked(ask, workload, server, keep_first, settings.max_seconds)
                runs.append(run)
                task.advance(1, f"{workload.load}, {run.output_tokens / run.total_generation_time:.1f} tok/s")
            peak = None if server is None else await peak_bytes(server.process.pid, client)
            measured.append(LoadRun(runs, peak))
    return measured


async def run_checked(
    ask: Ask,
    workload: Workload,
    server: ServerProcess | None,
    keep_first: int | None = None,
    max_seconds: float | None = None,
) -> WorkloadRun:
    """Runs a workload of which no request may fail. Raises FourfoldError."""
    run = await run_workload(ask, workload, keep_first, max_seconds)
    if run.failures:
        if server is not None:
            server.check_alive()
        raise FourfoldError(f"{len(run.failures)} of {len(run.requests)} requests failed; the first: {run.failures[0]}")
    return run


def warmup(workload: Workload, least: int) -> Workload:
    """Requests that resemble a workload's, with short answers.

    All at once, `least` or as many as run at once later: a batch of another size may take other kernels, or a graph
    that is not captured yet.
    """
    count = max(least, workload.load.concurrency or 0)
    first = workload.requests[0]
    requests = tuple(
        PlannedRequest(
            workload.requests[i % len(workload.requests)].problem,
            i,
            replace(first.params, max_tokens=min(WARMUP_TOKENS, first.params.max_tokens), seed=i),
        )
        for i in range(count)
    )
    return Workload(Load(concurrency=count), -1, -1, requests)
