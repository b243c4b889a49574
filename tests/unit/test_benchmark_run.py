"""Workloads: their plan, their run through a client, and the rows that come of it."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fourfold.benchmark.client import OfflineClient
from fourfold.benchmark.rows import read_csv, write_csv
from fourfold.benchmark.run import run_workload
from fourfold.benchmark.tables import concurrency_row, request_row, workload_row
from fourfold.benchmark.workload import plan_workloads, request_seed
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.engine.requests import RequestOutput, SamplingParams
from fourfold.errors import FourfoldError
from fourfold.problems.read import Problem

PROBLEMS = [Problem(f"p{i}", f"What is {i} + {i}?", "", str(2 * i), "") for i in range(4)]
PROMPTS = {problem.id: [1] * (3 + i) for i, problem in enumerate(PROBLEMS)}


class CountingEngine:
    """A real engine's manners without a network: request i ends after `lengths[i]` tokens, two tokens a step."""

    def __init__(self, lengths: list[int], step_seconds: float = 0.0) -> None:
        self.lengths = lengths
        self.step_seconds = step_seconds
        self.outputs: dict[str, RequestOutput] = {}
        self.params: list[SamplingParams] = []
        self.cancelled: list[str] = []

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None = None) -> str:
        name = request_id or f"r{len(self.outputs)}"
        self.outputs[name] = RequestOutput(name, prompt_token_ids, arrival_time=time.perf_counter())
        self.params.append(params)
        return name

    @property
    def running(self) -> list[RequestOutput]:
        return [output for output in self.outputs.values() if output.finish_reason is None]

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        now = time.perf_counter()
        changed = self.running
        for output in changed:
            length = self.lengths[list(self.outputs).index(output.request_id)]
            if output.first_token_time is None:
                output.scheduled_time = output.first_token_time = now
            else:
                output.speculation.num_drafts += 1
                output.speculation.num_draft_tokens += 3
            output.token_ids += [7] * min(2, length - len(output.token_ids))
            output.text = f"#### {len(output.token_ids)}"
            if len(output.token_ids) == length:
                output.finish_reason, output.finished_time = "stop", now
        return changed

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.outputs[request_id].finish_reason = "cancelled"


def judge(text: str, expected: str) -> tuple[str, bool]:
    answer = text.removeprefix("#### ")
    return answer, answer == expected


def test_same_problem_plan() -> None:
    settings = BenchmarkSettings(problems=2, concurrency=[3], repeats=2)
    plan = plan_workloads(settings, PROBLEMS, 3)
    assert [(w.repeat, w.index, [r.problem.id for r in w.requests]) for w in plan] == [
        (0, 0, ["p0"] * 3),
        (0, 1, ["p1"] * 3),
        (1, 0, ["p0"] * 3),
        (1, 1, ["p1"] * 3),
    ]
    seeds = [r.params.seed for w in plan for r in w.requests]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [r.params.seed for w in plan_workloads(settings, PROBLEMS, 3) for r in w.requests]


def test_different_problems_plan_fills_the_last_workload() -> None:
    settings = BenchmarkSettings(problems=4, concurrency=[3], same_problem=False)
    plan = plan_workloads(settings, PROBLEMS, 3)
    assert [[r.problem.id for r in w.requests] for w in plan] == [["p0", "p1", "p2"], ["p3", "p0", "p1"]]


def test_plan_refuses_what_the_problems_cannot_give() -> None:
    with pytest.raises(FourfoldError, match=r"benchmark\.problems is 5, but there are 4"):
        plan_workloads(BenchmarkSettings(problems=5), PROBLEMS, 1)
    with pytest.raises(ValidationError, match=r"concurrency 5 with same_problem false"):
        BenchmarkSettings(problems=4, concurrency=[5], same_problem=False)


def test_seed_is_stable() -> None:
    assert request_seed(0, 0, 1, "p0", 0) == int("bff2f9b8", 16)  # sha256 of "0|0|1|p0|0"


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 64), st.text(max_size=5), st.integers(0, 64))
def test_each_part_moves_the_seed(seed: int, repeat: int, concurrency: int, problem: str, index: int) -> None:
    base = request_seed(seed, repeat, concurrency, problem, index)
    assert 0 <= base < 2**32
    others = [
        request_seed(seed + 1, repeat, concurrency, problem, index),
        request_seed(seed, repeat + 1, concurrency, problem, index),
        request_seed(seed, repeat, concurrency + 1, problem, index),
        request_seed(seed, repeat, concurrency, problem + "x", index),
        request_seed(seed, repeat, concurrency, problem, index + 1),
    ]
    assert base not in others


def run(lengths: list[int], keep_first: int | None = None, max_seconds: float | None = None, step: float = 0.0):
    engine = CountingEngine(lengths, step)
    settings = BenchmarkSettings(problems=1, concurrency=[len(lengths)], max_tokens=99)
    plan = plan_workloads(settings, PROBLEMS[1:], len(lengths))[0]
    return engine, run_workload(OfflineClient(engine), plan, PROMPTS, keep_first, max_seconds)


def test_waits_for_all() -> None:
    engine, result = run([2, 5, 3])
    assert [r.output.finish_reason for r in result.requests] == ["stop"] * 3
    assert result.output_tokens == 10
    assert engine.cancelled == []
    assert [r.chunks.sizes for r in result.requests] == [[1, 1], [1, 1, 2, 1], [1, 1, 1]]  # the first token by itself
    assert [p.seed for p in engine.params] == [r.planned.params.seed for r in result.requests]
    assert all(b > a for r in result.requests for a, b in pairwise(r.chunks.times))


def test_keeps_the_first_and_cancels_the_rest() -> None:
    engine, result = run([2, 9, 4, 9], keep_first=2)
    assert [r.output.finish_reason for r in result.requests] == ["stop", "cancelled", "stop", "cancelled"]
    assert engine.cancelled == ["r1", "r3"]
    assert result.output_tokens == 2 + 4 + 4 + 4  # all tokens until the stop
    assert not engine.has_unfinished
    row = workload_row("e", result)
    assert (row["finished"], row["cancelled"], row["output_tokens"], row["finished_output_tokens"]) == (2, 2, 14, 6)
    assert row["output_throughput"] == pytest.approx(14 / result.total_generation_time)
    assert row["finished_output_throughput"] == pytest.approx(6 / result.total_generation_time)


def test_stops_after_max_seconds() -> None:
    engine, result = run([4, 100_000], max_seconds=0.1, step=0.02)
    assert [r.output.finish_reason for r in result.requests] == ["stop", "cancelled"]
    assert 0.1 <= result.total_generation_time < 1.0
    assert engine.cancelled == ["r1"]


def test_rows_by_hand() -> None:
    _, result = run([2, 9, 4], keep_first=2)  # problem p1: the answer is 2
    rows = [request_row("e", result, r, judge) for r in result.requests]
    assert [row["correct"] for row in rows] == [True, None, False]
    assert [row["answer"] for row in rows] == ["2", None, "4"]
    assert rows[1]["ttft"] is None
    assert rows[1]["e2e_latency"] is None
    assert rows[2]["tpot"] == pytest.approx((rows[2]["e2e_latency"] - rows[2]["ttft"]) / 3)
    line = concurrency_row("e", [result], rows, devices=2, max_drafts=3)
    assert (line["requests"], line["finished"], line["cancelled"], line["scored"], line["correct"]) == (3, 2, 1, 2, 1)
    assert line["accuracy"] == 0.5
    assert line["accuracy_se"] == pytest.approx((0.25 / 2) ** 0.5)
    assert line["output_tokens"] == 10
    assert line["output_throughput_per_device"] == pytest.approx(line["output_throughput"] / 2)
    shares = [2 / result.total_generation_time, 4 / result.total_generation_time]
    assert line["recipe_request_throughput_mean"] == pytest.approx(sum(shares) / 2)
    assert line["num_drafts"] == 2
    assert line["acceptance_length"] == 1.0
    assert [line[f"acceptance_rate_{i}"] for i in range(3)] == [None] * 3


def test_an_answer_cut_at_max_tokens_is_wrong() -> None:
    _, result = run([2])
    result.requests[0].output.finish_reason = "length"
    row = request_row("e", result, result.requests[0], judge)
    assert row["answer"] == row["expected_answer"]
    assert row["correct"] is False
    assert concurrency_row("e", [result], [row], 1, 0)["truncated"] == 1


def test_an_engine_that_stops_early_is_an_error() -> None:
    class Dead(CountingEngine):
        has_unfinished = False

    plan = plan_workloads(BenchmarkSettings(problems=1, concurrency=[1]), PROBLEMS, 1)[0]
    with pytest.raises(RuntimeError, match="0 of 1 requests finished"):
        run_workload(OfflineClient(Dead([1])), plan, PROMPTS)


def test_csv_round_trip(tmp_path) -> None:
    rows = [{"a": 1, "b": 0.5, "c": None, "d": "x,y"}, {"a": 2, "e": 1 / 3}]
    write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == 'a,b,c,d,e\n1,0.5,,"x,y",\n2,,,,0.33333333\n'
    assert read_csv(tmp_path / "t.csv")[0] == {"a": 1, "b": 0.5, "c": None, "d": "x,y", "e": None}
