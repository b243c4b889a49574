"""What a sandbox costs on this machine, measured: the figures of docs/sandbox.md."""

import asyncio
import statistics
import time

import psutil

from fourfold.sandbox.policy import Policy
from fourfold.sandbox.pool import MAX_CELLS, Pool, PoolSettings
from fourfold.sandbox.selftest import require_isolation
from fourfold.sandbox.worker import Worker


def measure(cells: int, starts: int) -> str:
    """A table in Markdown: cold start, warm hand-out, `1+1`, memory. Raises SandboxUnavailable."""
    return asyncio.run(_measure(require_isolation(), cells, starts))


async def _measure(policy: Policy, cells: int, starts: int) -> str:
    cold, memory = [], []
    for _ in range(starts):
        begin = time.perf_counter()
        worker = await Worker.start(policy, slot=1)
        cold.append(time.perf_counter() - begin)
        memory.append(psutil.Process(worker.python).memory_full_info().uss)
        await worker.kill()
    pool = Pool(policy, PoolSettings(ready=1, max_sessions=2, max_running=1))
    await pool.open()
    try:
        handed = []
        for index in range(starts):
            while not pool.ready:
                await asyncio.sleep(0.05)
            handed.append(await _seconds(pool, f"new{index}"))
            await pool.delete(f"new{index}")
        times: list[float] = []
        while len(times) < cells:
            name = f"cells{len(times)}"
            await _seconds(pool, name)
            times += [await _seconds(pool, name) for _ in range(MAX_CELLS - 2)]
            await pool.delete(name)
    finally:
        await pool.close()
    times.sort()
    rows = [
        ("cold start, libraries imported", f"{1e3 * statistics.median(cold):.0f} ms"),
        ("new session from a warm sandbox, with its first `1+1`", f"{1e3 * statistics.median(handed):.2f} ms"),
        ("`1+1` in a session, median", f"{1e3 * statistics.median(times):.2f} ms"),
        ("`1+1` in a session, 99th percentile", f"{1e3 * times[int(0.99 * len(times))]:.2f} ms"),
        ("memory of its own (USS) of a session", f"{statistics.median(memory) / 2**20:.0f} MiB"),
    ]
    return "\n".join(["| what | measured |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


async def _seconds(pool: Pool, session: str) -> float:
    begin = time.perf_counter()
    await pool.run(session, "1+1", timeout=10, stdin="", minimal=False)
    return time.perf_counter() - begin
