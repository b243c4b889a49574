"""Workloads: their plan, their run, and the rows that come of it."""

import asyncio
import statistics
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fourfold.benchmark.bench_serve import bench_serve_record, busiest_second, most_at_once
from fourfold.benchmark.rows import read_csv, write_csv
from fourfold.benchmark.run import WorkloadRun, run_workload
from fourfold.benchmark.tables import load_row, request_row, workload_row
from fourfold.benchmark.workload import Load, PlannedRequest, arrivals, loads, plan_workloads, request_seed
from fourfold.client.api import Completion
from fourfold.client.times import RequestTimes
from fourfold.config.benchmark import BenchmarkSettings, GoodputSettings
from fourfold.errors import FourfoldError
from fourfold.problems.read import Problem

PROBLEMS = [Problem(f"p{i}", f"What is {i} + {i}?", "", str(2 * i), "") for i in range(4)]
ASKED = PROBLEMS[1:]


class Steps:
    """A server's manners without one: request i has `lengths[i]` tokens, one in its first step and two in others."""

    def __init__(self, lengths: list[int], step_seconds: float = 0.0) -> None:
        self.lengths, self.step_seconds = lengths, step_seconds
        self.seeds: list[int] = []
        self.stopped: list[int] = []
        self.running = self.most = 0

    async def ask(self, planned: PlannedRequest, answer: Completion) -> None:
        self.seeds.append(planned.params.seed)
        self.running += 1
        self.most = max(self.most, self.running)
        answer.times.sent = time.perf_counter()
        length, tokens = self.lengths[planned.index], 0
        try:
            while tokens < length:
                await asyncio.sleep(self.step_seconds)
                if tokens:
                    answer.speculation.num_drafts += 1
                    answer.speculation.num_draft_tokens += 3
                tokens = min(length, tokens + (2 if tokens else 1))
                answer.times.see(tokens, time.perf_counter())
                answer.text = f"#### {tokens}"
        except asyncio.CancelledError:
            self.stopped.append(planned.index)
            raise
        finally:
            self.running -= 1
        answer.finish_reason, answer.times.finished = "stop", answer.times.times[-1]


def judge(text: str, expected: str) -> tuple[str, bool]:
    answer = text.removeprefix("#### ")
    return answer, answer == expected


def test_same_problem_plan() -> None:
    settings = BenchmarkSettings(problems=2, concurrency=[3], repeats=2)
    plan = plan_workloads(settings, PROBLEMS, Load(concurrency=3))
    assert [(w.repeat, w.index, [r.problem.id for r in w.requests]) for w in plan] == [
        (0, 0, ["p0"] * 3),
        (0, 1, ["p1"] * 3),
        (1, 0, ["p0"] * 3),
        (1, 1, ["p1"] * 3),
    ]
    seeds = [r.params.seed for w in plan for r in w.requests]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [r.params.seed for w in plan_workloads(settings, PROBLEMS, Load(concurrency=3)) for r in w.requests]


def test_different_problems_are_one_workload_a_repeat() -> None:
    settings = BenchmarkSettings(problems=4, concurrency=[3], same_problem=False, repeats=2)
    plan = plan_workloads(settings, PROBLEMS, Load(concurrency=3))
    assert [[r.problem.id for r in w.requests] for w in plan] == [["p0", "p1", "p2", "p3"]] * 2


def test_rates_ask_each_problem_once_and_the_same() -> None:
    settings = BenchmarkSettings(problems=4, concurrency=[3], request_rate=[2.0, 5.0])
    assert [str(load) for load in loads(settings)] == ["3 at once", "2 requests/s", "5 requests/s"]
    slow, quick = (plan_workloads(settings, PROBLEMS, load) for load in loads(settings)[1:])
    assert [r.problem.id for r in slow[0].requests] == ["p0", "p1", "p2", "p3"]
    assert [r.params for w in slow for r in w.requests] == [r.params for w in quick for r in w.requests]
    assert slow[0].requests[-1].arrival == pytest.approx(2.0)
    assert quick[0].requests[-1].arrival == pytest.approx(0.8)


@given(st.integers(1, 50), st.floats(0.01, 1e3), st.floats(0.05, 20), st.integers(0, 2**32 - 1))
def test_arrivals_keep_the_rate(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrivals(count, rate, burstiness, seed)
    assert times == sorted(times) == arrivals(count, rate, burstiness, seed)
    assert times[-1] == pytest.approx(count / rate)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_are_as_bursty_as_told(burstiness: float) -> None:
    """The gaps' coefficient of variation is that of a gamma distribution: 1 / sqrt(shape)."""
    times = arrivals(20_000, 3.0, burstiness, 1)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 3, rel=0.001)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_plan_refuses_what_the_problems_cannot_give() -> None:
    with pytest.raises(FourfoldError, match=r"benchmark\.problems is 5, but there are 4"):
        plan_workloads(BenchmarkSettings(problems=5), PROBLEMS, Load(concurrency=1))
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


def run(
    lengths: list[int], keep_first: int | None = None, max_seconds: float | None = None, step: float = 0.0
) -> tuple[Steps, WorkloadRun]:
    server = Steps(lengths, step)
    settings = BenchmarkSettings(problems=1, concurrency=[len(lengths)], max_tokens=99)
    plan = plan_workloads(settings, ASKED, Load(concurrency=len(lengths)))[0]
    return server, asyncio.run(run_workload(server.ask, plan, keep_first, max_seconds))


def test_waits_for_all() -> None:
    server, result = run([2, 5, 3])
    assert [r.answer.finish_reason for r in result.requests] == ["stop"] * 3
    assert result.output_tokens == 10
    assert server.stopped == []
    assert [r.answer.times.sizes for r in result.requests] == [[1, 1], [1, 2, 2], [1, 2]]
    assert server.seeds == [r.planned.params.seed for r in result.requests]
    assert all(b > a for r in result.requests for a, b in pairwise(r.answer.times.times))


def test_keeps_the_first_and_cancels_the_rest() -> None:
    server, result = run([2, 29, 4, 29], keep_first=2, step=0.01)
    assert [r.answer.finish_reason for r in result.requests] == ["stop", "cancelled", "stop", "cancelled"]
    assert server.stopped == [1, 3]
    assert server.running == 0
    row = workload_row("e", result)
    assert (row["finished"], row["cancelled"], row["finished_output_tokens"]) == (2, 2, 6)
    assert 6 < row["output_tokens"] == sum(r.answer.times.tokens for r in result.requests) < 30  # all until the stop
    assert row["output_throughput"] == pytest.approx(row["output_tokens"] / result.total_generation_time)
    assert row["finished_output_throughput"] == pytest.approx(6 / result.total_generation_time)


def test_stops_after_max_seconds() -> None:
    server, result = run([4, 100_000], max_seconds=0.1, step=0.01)
    assert [r.answer.finish_reason for r in result.requests] == ["stop", "cancelled"]
    assert 0.1 <= result.total_generation_time < 1.0
    assert server.stopped == [1]


def test_a_closed_loop_keeps_so_many_running() -> None:
    server = Steps([3, 9, 3, 5], 0.005)
    settings = BenchmarkSettings(problems=4, concurrency=[2], same_problem=False)
    result = asyncio.run(run_workload(server.ask, plan_workloads(settings, PROBLEMS, Load(concurrency=2))[0]))
    assert server.most == 2
    starts = [r.answer.times.sent for r in result.requests]
    ends = [r.answer.times.finished for r in result.requests]
    # The third comes when the first has ended, while the second still runs.
    assert ends[0] <= starts[2] < ends[1]
    assert most_at_once([r.answer.times for r in result.requests]) == 2


def test_an_open_loop_sends_in_time_whatever_runs() -> None:
    server = Steps([40] * 4, 0.01)
    settings = BenchmarkSettings(problems=4, concurrency=[1], request_rate=[40.0])
    (workload,) = plan_workloads(settings, PROBLEMS, Load(request_rate=40.0))
    begin = time.perf_counter()
    result = asyncio.run(run_workload(server.ask, workload))
    late = [r.answer.times.sent - begin - r.planned.arrival for r in result.requests]
    assert min(late) >= 0
    assert max(late) < 0.08
    assert server.most == 4


def test_an_error_of_the_program_is_raised() -> None:
    async def broken(planned: PlannedRequest, answer: Completion) -> None:
        raise ZeroDivisionError

    plan = plan_workloads(BenchmarkSettings(problems=1, concurrency=[2]), PROBLEMS, Load(concurrency=2))[0]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_workload(broken, plan))


def test_rows_by_hand() -> None:
    _, result = run([2, 29, 4], keep_first=2, step=0.01)  # problem p1: the answer is 2
    rows = [request_row("e", result, r, judge) for r in result.requests]
    assert [row["correct"] for row in rows] == [True, None, False]
    assert [row["answer"] for row in rows] == ["2", None, "4"]
    assert rows[1]["ttft"] is None
    assert rows[1]["e2e_latency"] is None
    assert rows[2]["tpot"] == pytest.approx((rows[2]["e2e_latency"] - rows[2]["ttft"]) / 3)
    line = load_row("e", [result], rows, devices=2, max_drafts=3)
    assert (line["requests"], line["finished"], line["cancelled"], line["scored"], line["correct"]) == (3, 2, 1, 2, 1)
    assert line["accuracy"] == 0.5
    assert line["accuracy_se"] == pytest.approx((0.25 / 2) ** 0.5)
    assert line["output_throughput_per_device"] == pytest.approx(line["output_throughput"] / 2)
    shares = [2 / result.total_generation_time, 4 / result.total_generation_time]
    assert line["recipe_request_throughput_mean"] == pytest.approx(sum(shares) / 2)
    assert line["acceptance_length"] == 1.0
    assert [line[f"acceptance_rate_{i}"] for i in range(3)] == [None] * 3
    assert line["output_throughput_low"] is None  # a single repeat
    assert line["request_goodput"] is None  # no limit


def timed(ends: list[float], repeat: int = 0) -> WorkloadRun:
    """Requests sent at 0 with their first token at half their time; all end within 2 s."""
    settings = BenchmarkSettings(problems=1, concurrency=[len(ends)], repeats=repeat + 1)
    plan = plan_workloads(settings, ASKED, Load(concurrency=len(ends)))[repeat]

    async def ask(planned: PlannedRequest, answer: Completion) -> None:
        end = ends[planned.index]
        answer.times = RequestTimes(0.0, [end / 2, end], [1, 4], end)
        answer.prompt_tokens, answer.text, answer.finish_reason = 7, "#### 2", "stop"

    result = asyncio.run(run_workload(ask, plan))
    result.total_generation_time = 2.0
    return result


def rows_of(runs: list[WorkloadRun]) -> list[dict]:
    return [request_row("e", run, r, judge) for run in runs for r in run.requests]


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"e2e_latency": 1.0}, 2),
        ({"ttft": 0.25}, 1),
        ({"tpot": 0.15}, 2),  # half of the time for four tokens: 0.0625, 0.125, 0.25
        ({"tpot": 0.15, "ttft": 0.25}, 1),
        ({"e2e_latency": 0.1}, 0),
    ],
)
def test_goodput_by_hand(limits: dict[str, float], good: int) -> None:
    run = timed([0.5, 1.0, 2.0])
    line = load_row("e", [run], rows_of([run]), goodput=GoodputSettings(**limits))
    assert line["request_goodput"] == good / 2.0


def test_intervals_over_repeats_by_hand() -> None:
    runs = [timed([1.0]), timed([2.0], 1)]
    runs[1].total_generation_time = 1.0
    line = load_row("e", runs, rows_of(runs))
    # Two repeats of 2.5 and 5 tokens/s: 3.75 ± 12.706 * 1.7678 / sqrt(2).
    assert line["output_throughput_low"] == pytest.approx(3.75 - 15.8828, abs=1e-3)
    assert line["output_throughput_high"] == pytest.approx(3.75 + 15.8828, abs=1e-3)
    assert line["e2e_latency_mean"] == pytest.approx(1.5)
    assert line["e2e_latency_mean_high"] == pytest.approx(1.5 + 12.7062 * 0.7071 / 2**0.5, abs=1e-3)


def test_bench_serve_record_by_hand() -> None:
    runs = [timed([0.5, 1.0]), timed([2.0, 2.0], 1)]
    settings = BenchmarkSettings(problems=1, concurrency=[2], goodput=GoodputSettings(ttft=0.5))
    line = load_row("e", runs, rows_of(runs), goodput=settings.goodput)
    record = bench_serve_record(runs, line, settings)
    assert (record["completed"], record["failed"], record["duration"]) == (4, 0, 4.0)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (28, 20)
    assert (record["request_throughput"], record["request_goodput"]) == (1.0, 0.5)
    assert (record["output_throughput"], record["total_token_throughput"]) == (5.0, 12.0)
    assert record["mean_e2el_ms"] == pytest.approx(1375)
    assert record["median_ttft_ms"] == pytest.approx(750)
    assert record["mean_itl_ms"] == pytest.approx(687.5)  # of chunks, of which each holds four tokens
    assert record["mean_tpot_ms"] == pytest.approx(687.5 / 4)
    assert record["max_concurrent_requests"] == 2
    assert record["max_output_tokens_per_s"] == 8
    assert "spec_decode_acceptance_length" not in record


def test_peaks_by_hand() -> None:
    one, two = RequestTimes(0.0, [0.5, 1.5], [2, 3], 1.5), RequestTimes(1.5, [1.9, 2.2], [4, 5], 2.2)
    assert most_at_once([one, two]) == 1  # the second begins when the first ends
    assert most_at_once([one, RequestTimes(1.0, [1.9], [4])]) == 2
    assert busiest_second([one, two]) == 7


def test_an_answer_cut_at_max_tokens_is_wrong() -> None:
    _, result = run([2])
    result.requests[0].answer.finish_reason = "length"
    row = request_row("e", result, result.requests[0], judge)
    assert row["answer"] == row["expected_answer"]
    assert row["correct"] is False
    assert load_row("e", [result], [row])["truncated"] == 1


def test_csv_round_trip(tmp_path) -> None:
    rows = [{"a": 1, "b": 0.5, "c": None, "d": "x,y"}, {"a": 2, "e": 1 / 3}]
    write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == 'a,b,c,d,e\n1,0.5,,"x,y",\n2,,,,0.33333333\n'
    assert read_csv(tmp_path / "t.csv")[0] == {"a": 1, "b": 0.5, "c": None, "d": "x,y", "e": None}
