"""The workloads: which requests are sent when, with which seeds. The same for every engine."""

import hashlib
import random
from dataclasses import dataclass

from fourfold.config.benchmark import BenchmarkSettings
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.problems.read import Problem


@dataclass(frozen=True)
class Load:
    """How requests come: a closed loop keeps `concurrency` of them running, an open loop sends them at a rate."""

    concurrency: int | None = None
    request_rate: float | None = None
    """Requests per second, whatever still runs."""

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.request_rate is None else f"{self.request_rate:g} requests/s"


@dataclass(frozen=True)
class PlannedRequest:
    """One generation: the problem to answer, its place in the workload and its sampling parameters."""

    problem: Problem
    index: int
    params: SamplingParams
    arrival: float = 0.0
    """When it is sent, in seconds from the workload's start; in a closed loop, the earliest moment."""


@dataclass(frozen=True)
class Workload:
    """Generations that are measured together."""

    load: Load
    repeat: int
    index: int
    requests: tuple[PlannedRequest, ...]


def request_seed(seed: int, repeat: int, load: float, problem_id: str, index: int) -> int:
    """Seed of one request, 0 to 2^32 - 1: a hash, so that no other setting moves it.

    `load` is the concurrency of a closed loop, and 0 in an open one: all rates ask the same.
    """
    key = f"{seed}|{repeat}|{load}|{problem_id}|{index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def loads(settings: BenchmarkSettings) -> list[Load]:
    """All loads of the configuration, closed loops first."""
    closed = [Load(concurrency=concurrency) for concurrency in settings.concurrency]
    return closed + [Load(request_rate=rate) for rate in settings.request_rate]


def plan_workloads(settings: BenchmarkSettings, problems: list[Problem], load: Load) -> list[Workload]:
    """The workloads of one load, all repeats, in order.

    In a closed loop with `same_problem`, a workload is `concurrency` generations for one problem, one workload a
    problem. Else it is one generation for each problem.
    Raises FourfoldError when there are fewer problems than that needs.
    """
    chosen = problems[: settings.problems]
    if len(chosen) < settings.problems:
        raise FourfoldError(
            f"benchmark.problems is {settings.problems}, but there are {len(problems)}; "
            "lower it or raise problems.splits.benchmark"
        )
    groups = [chosen]
    if load.concurrency is not None and settings.same_problem:
        groups = [[problem] * load.concurrency for problem in chosen]
    return [
        Workload(load, repeat, index, tuple(_requests(settings, group, repeat, load)))
        for repeat in range(settings.repeats)
        for index, group in enumerate(groups)
    ]


def _requests(settings: BenchmarkSettings, group: list[Problem], repeat: int, load: Load) -> list[PlannedRequest]:
    times = [0.0] * len(group)
    if load.request_rate is not None:
        times = arrivals(
            len(group), load.request_rate, settings.burstiness, request_seed(settings.seed, repeat, 0, "", 0)
        )
    return [
        PlannedRequest(
            problem,
            index,
            SamplingParams(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=request_seed(settings.seed, repeat, load.concurrency or 0, problem.id, index),
            ),
            arrival,
        )
        for index, (problem, arrival) in enumerate(zip(group, times, strict=True))
    ]


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests come, in seconds, the last one after count / rate exactly.

    As in vLLM's benchmark: gaps are of a gamma distribution with shape `burstiness` (1 is a Poisson process, less comes
    in bursts, more comes evenly) and mean 1 / rate, and are then stretched to the rate.
    """
    chance = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += chance.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    # A gap may be too small for a number, if all are.
    stretch = count / rate / now if now else 0.0
    return [at * stretch for at in times]
