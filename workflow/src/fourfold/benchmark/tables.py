"""Rows of the benchmark's files: one a request, one a workload, one a load."""

from collections.abc import Callable, Sequence

from fourfold.benchmark import metrics
from fourfold.benchmark.rows import Row
from fourfold.benchmark.run import RequestRun, WorkloadRun
from fourfold.client.times import RequestTimes
from fourfold.config.benchmark import GoodputSettings

Judge = Callable[[str, str], tuple[str | None, bool]]
"""Text and expected answer → extracted answer, and whether it is right."""


def request_row(engine: str, workload: WorkloadRun, run: RequestRun, judge: Judge) -> Row:
    """One request. Times in seconds, throughputs in tokens/s; `correct` is None for a cancelled request.

    An answer cut at max_tokens (finish_reason `length`) counts as wrong, whatever it says.
    """
    seen, planned = run.answer, run.planned
    times, stats = seen.times, seen.speculation
    answer, right = (
        judge(seen.code.written if seen.code else seen.text, planned.problem.answer) if run.finished else (None, False)
    )
    row: Row = {
        "engine": engine,
        **_load(workload),
        "repeat": workload.workload.repeat,
        "workload": workload.workload.index,
        "problem_id": planned.problem.id,
        "index": planned.index,
        "seed": planned.params.seed,
        "prompt_tokens": seen.prompt_tokens,
        "output_tokens": times.tokens,
        "finish_reason": seen.finish_reason,
        "queue_time": seen.queue_time if run.finished else None,
    }
    # A stopped request has no end of its own: its latencies would mix with those of whole answers.
    row |= {name: metric(times) if run.finished else None for name, metric in LATENCIES.items()}
    row |= {
        "itl": metrics.mean(metrics.inter_token_latencies(times)) if run.finished else None,
        "icl": metrics.mean(metrics.inter_chunk_latencies(times)) if run.finished else None,
        "num_drafts": stats.num_drafts,
        "draft_tokens": stats.num_draft_tokens,
        "accepted_per_position": list(stats.accepted_per_position),
        "acceptance_length": metrics.acceptance_length(stats),
        "code_executions": seen.code.executions if seen.code else None,
        "code_execution_time": seen.code.seconds if seen.code else None,
        "code_timeouts": seen.code.timeouts if seen.code else None,
        "answer": answer,
        "expected_answer": planned.problem.answer,
        "correct": (right and seen.finish_reason == "stop") if run.finished else None,
        "text": seen.text,
    }
    return row


LATENCIES: dict[str, Callable[[RequestTimes], float | None]] = {
    "ttft": metrics.ttft,
    "tpot": metrics.tpot,
    "e2e_latency": metrics.e2e_latency,
    "output_throughput": metrics.request_throughput,
    "decode_throughput": metrics.decode_throughput,
}


def _load(run: WorkloadRun) -> Row:
    load = run.workload.load
    return {"concurrency": load.concurrency, "request_rate": load.request_rate}


def workload_row(engine: str, run: WorkloadRun) -> Row:
    """One workload: time from submission to the stop, tokens, batch throughput."""
    finished = sum(r.answer.times.tokens for r in run.requests if r.finished)
    seconds = run.total_generation_time
    return {
        "engine": engine,
        **_load(run),
        "repeat": run.workload.repeat,
        "workload": run.workload.index,
        "problem_id": run.requests[0].planned.problem.id,
        "requests": len(run.requests),
        "finished": sum(r.finished for r in run.requests),
        "cancelled": sum(not r.finished for r in run.requests),
        "total_generation_time": seconds,
        "output_tokens": run.output_tokens,
        "finished_output_tokens": finished,
        "output_throughput": metrics.batch_throughput(run.output_tokens, seconds),
        "finished_output_throughput": metrics.batch_throughput(finished, seconds),
    }


def load_row(
    engine: str,
    runs: list[WorkloadRun],
    requests: list[Row],
    *,
    devices: int = 1,
    max_drafts: int = 0,
    goodput: GoodputSettings | None = None,
) -> Row:
    """One load: all its workloads and repeats together.

    Intervals (`_low`, `_high`) are 95 % intervals of a mean over the repeats; with one repeat there are none.

    Args:
        engine: its name.
        runs: the workloads.
        requests: their request rows, in the same order.
        devices: devices that the engine runs on.
        max_drafts: draft positions to give a column each (0 without a drafter).
        goodput: what good requests keep.
    """
    stats = metrics.pool([r.answer.speculation for run in runs for r in run.requests])
    seconds = [run.total_generation_time for run in runs]
    tokens = sum(run.output_tokens for run in runs)
    finished = [row for row in requests if row["correct"] is not None]
    finished_tokens = sum(row["output_tokens"] for row in finished)
    throughput = metrics.batch_throughput(tokens, sum(seconds))
    row: Row = {
        "engine": engine,
        **_load(runs[0]),
        "workloads": len(runs),
        "requests": len(requests),
        "finished": len(finished),
        "cancelled": len(requests) - len(finished),
        "truncated": sum(row["finish_reason"] == "length" for row in finished),
        "prompt_tokens": sum(row["prompt_tokens"] for row in requests),
        "output_tokens": tokens,
        "total_generation_time": sum(seconds),
        "total_generation_time_mean": metrics.mean(seconds),
        "total_generation_time_sd": metrics.standard_deviation(seconds),
        "output_throughput": throughput,
        "output_throughput_per_device": None if throughput is None else throughput / devices,
        "finished_output_throughput": metrics.batch_throughput(finished_tokens, sum(seconds)),
    }
    row |= _spread("request_throughput", _values(finished, "output_throughput"))
    row |= _spread("decode_throughput", _values(finished, "decode_throughput"))
    # The recipe divides each request's tokens by the whole workload's time.
    shares = [r.answer.times.tokens / run.total_generation_time for run in runs for r in run.requests if r.finished]
    row |= _spread("recipe_request_throughput", shares)
    for name in ("ttft", "tpot", "e2e_latency"):
        row |= _percentiles(name, _values(finished, name))
    done = [r.answer.times for run in runs for r in run.requests if r.finished]
    row |= _percentiles("itl", [gap for times in done for gap in metrics.inter_token_latencies(times)])
    row |= _percentiles("icl", [gap for times in done for gap in metrics.inter_chunk_latencies(times)])
    row |= _percentiles("queue_time", _values(finished, "queue_time"))
    rates = metrics.acceptance_rate_per_position(stats)
    row |= {
        "num_drafts": stats.num_drafts,
        "draft_tokens": stats.num_draft_tokens,
        "acceptance_length": metrics.acceptance_length(stats),
        "acceptance_length_request_mean": metrics.mean(_values(requests, "acceptance_length")),
        "acceptance_rate": metrics.acceptance_rate(stats),
    }
    row |= {f"acceptance_rate_{i}": rates[i] if i < len(rates) else None for i in range(max_drafts)}
    for name in ("code_executions", "code_execution_time", "code_timeouts"):
        values = _values(requests, name)
        row[name] = sum(values) if values else None
    correct = [row["correct"] for row in finished]
    row |= {
        "scored": len(correct),
        "correct": sum(correct),
        "accuracy": metrics.accuracy(correct),
        "accuracy_se": metrics.accuracy_standard_error(correct, [row["problem_id"] for row in finished]),
    }
    return (
        row
        | _intervals(runs, finished)
        | {"request_goodput": request_goodput(finished, goodput or GoodputSettings(), sum(seconds))}
    )


def request_goodput(finished: list[Row], limits: GoodputSettings, seconds: float) -> float | None:
    """Finished requests a second that keep all limits; None without any limit.

    As in vLLM, a request of one token has a tpot of 0.
    """
    given = {name: limit for name, limit in limits.model_dump().items() if limit is not None}
    if not given or seconds <= 0:
        return None
    return sum(all((row[name] or 0) <= limit for name, limit in given.items()) for row in finished) / seconds


def _intervals(runs: list[WorkloadRun], finished: list[Row]) -> Row:
    """Intervals of the throughput and of mean latencies over the repeats."""
    repeats = sorted({run.workload.repeat for run in runs})
    mine = [[run for run in runs if run.workload.repeat == repeat] for repeat in repeats]
    means: dict[str, list[float | None]] = {
        "output_throughput": [
            metrics.batch_throughput(sum(r.output_tokens for r in some), sum(r.total_generation_time for r in some))
            for some in mine
        ]
    }
    for name in ("ttft", "tpot", "e2e_latency"):
        rows = [[row for row in finished if row["repeat"] == repeat] for repeat in repeats]
        means[f"{name}_mean"] = [metrics.mean(_values(some, name)) for some in rows]
    row: Row = {name: metrics.mean([v for v in values if v is not None]) for name, values in means.items()}
    del row["output_throughput"]
    for name, values in means.items():
        found = metrics.interval([v for v in values if v is not None]) or (None, None)
        row |= {f"{name}_low": found[0], f"{name}_high": found[1]}
    return row


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _spread(name: str, values: Sequence[float]) -> Row:
    return {f"{name}_mean": metrics.mean(values), f"{name}_sd": metrics.standard_deviation(values)}


def _percentiles(name: str, values: Sequence[float]) -> Row:
    ordered = sorted(values)
    return {f"{name}_p{percent}": metrics.percentile(ordered, percent) for percent in metrics.PERCENTILES}
