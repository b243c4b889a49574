"""The workloads: which requests run at once, with which seeds. The same for every engine."""

import hashlib
from dataclasses import dataclass

from fourfold.config.benchmark import BenchmarkSettings
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.problems.read import Problem


@dataclass(frozen=True)
class PlannedRequest:
    """One generation: the problem to answer, its place in the workload and its sampling parameters."""

    problem: Problem
    index: int
    params: SamplingParams


@dataclass(frozen=True)
class Workload:
    """Generations that are submitted at once."""

    concurrency: int
    repeat: int
    index: int
    requests: tuple[PlannedRequest, ...]


def request_seed(seed: int, repeat: int, concurrency: int, problem_id: str, index: int) -> int:
    """Seed of one request, 0 to 2^32 - 1: a hash, so that no other setting moves it."""
    key = f"{seed}|{repeat}|{concurrency}|{problem_id}|{index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def plan_workloads(settings: BenchmarkSettings, problems: list[Problem], concurrency: int) -> list[Workload]:
    """The workloads of one concurrency, all repeats, in order.

    With `same_problem`, a workload is `concurrency` generations for one problem, one workload a problem. Without, it
    is `concurrency` different problems; the last workload is filled up with the first problems again.
    Raises FourfoldError when there are fewer problems than that needs.
    """
    chosen = problems[: settings.problems]
    if len(chosen) < settings.problems:
        raise FourfoldError(
            f"benchmark.problems is {settings.problems}, but there are {len(problems)}; "
            "lower it or raise problems.splits.benchmark"
        )
    if settings.same_problem:
        groups = [[problem] * concurrency for problem in chosen]
    else:
        starts = range(0, len(chosen), concurrency)
        groups = [[chosen[(start + i) % len(chosen)] for i in range(concurrency)] for start in starts]
    return [
        Workload(concurrency, repeat, index, tuple(_requests(settings, group, repeat, concurrency)))
        for repeat in range(settings.repeats)
        for index, group in enumerate(groups)
    ]


def _requests(settings: BenchmarkSettings, group: list[Problem], repeat: int, concurrency: int) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            problem,
            index,
            SamplingParams(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=request_seed(settings.seed, repeat, concurrency, problem.id, index),
            ),
        )
        for index, problem in enumerate(group)
    ]
