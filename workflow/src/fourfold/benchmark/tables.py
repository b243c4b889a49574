"""Rows of the benchmark's files: one a request, one a workload, one a concurrency."""

from collections.abc import Callable, Sequence
from typing import Any

from fourfold.benchmark import metrics
from fourfold.benchmark.run import RequestRun, WorkloadRun
from fourfold.engine.requests import RequestOutput

Row = dict[str, Any]
Judge = Callable[[str, str], tuple[str | None, bool]]
"""Text and expected answer → extracted answer, and whether it is right."""


def request_row(engine: str, workload: WorkloadRun, run: RequestRun, judge: Judge) -> Row:
    """One request. Times in seconds, throughputs in tokens/s; `correct` is None for a cancelled request.

    An answer cut at max_tokens (finish_reason `length`) counts as wrong, whatever it says.
    """
    output, planned = run.output, run.planned
    stats = output.speculation
    answer, right = judge(output.text, planned.problem.answer) if run.finished else (None, False)
    row: Row = {
        "engine": engine,
        "concurrency": workload.workload.concurrency,
        "repeat": workload.workload.repeat,
        "workload": workload.workload.index,
        "problem_id": planned.problem.id,
        "index": planned.index,
        "seed": planned.params.seed,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
    }
    # A stopped request has no end of its own: its latencies would mix with those of whole answers.
    row |= {name: metric(output) if run.finished else None for name, metric in LATENCIES.items()}
    row |= {
        "itl": metrics.mean(metrics.inter_token_latencies(run.chunks)) if run.finished else None,
        "icl": metrics.mean(metrics.inter_chunk_latencies(run.chunks)) if run.finished else None,
        "num_drafts": stats.num_drafts,
        "draft_tokens": stats.num_draft_tokens,
        "accepted_per_position": list(stats.accepted_per_position),
        "acceptance_length": metrics.acceptance_length(stats),
        "answer": answer,
        "expected_answer": planned.problem.answer,
        "correct": (right and output.finish_reason == "stop") if run.finished else None,
        "text": output.text,
    }
    return row


LATENCIES: dict[str, Callable[[RequestOutput], float | None]] = {
    "queue_time": metrics.queue_time,
    "ttft": metrics.ttft,
    "tpot": metrics.tpot,
    "e2e_latency": metrics.e2e_latency,
    "output_throughput": metrics.request_throughput,
    "decode_throughput": metrics.decode_throughput,
}


def workload_row(engine: str, run: WorkloadRun) -> Row:
    """One workload: time from submission to the stop, tokens, batch throughput."""
    finished = sum(len(r.output.token_ids) for r in run.requests if r.finished)
    seconds = run.total_generation_time
    return {
        "engine": engine,
        "concurrency": run.workload.concurrency,
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


def concurrency_row(engine: str, runs: list[WorkloadRun], requests: list[Row], devices: int, max_drafts: int) -> Row:
    """One concurrency: all its workloads and repeats together.

    Args:
        engine: its name.
        runs: the workloads.
        requests: their request rows, in the same order.
        devices: devices that the engine runs on.
        max_drafts: draft positions to give a column each (0 without a drafter).
    """
    stats = metrics.pool([r.output.speculation for run in runs for r in run.requests])
    seconds = [run.total_generation_time for run in runs]
    tokens = sum(run.output_tokens for run in runs)
    finished = [row for row in requests if row["correct"] is not None]
    finished_tokens = sum(row["output_tokens"] for row in finished)
    throughput = metrics.batch_throughput(tokens, sum(seconds))
    row: Row = {
        "engine": engine,
        "concurrency": runs[0].workload.concurrency,
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
    shares = [len(r.output.token_ids) / run.total_generation_time for run in runs for r in run.requests if r.finished]
    row |= _spread("recipe_request_throughput", shares)
    for name in ("ttft", "tpot", "e2e_latency"):
        row |= _percentiles(name, _values(finished, name))
    done = [r.chunks for run in runs for r in run.requests if r.finished]
    row |= _percentiles("itl", [gap for chunks in done for gap in metrics.inter_token_latencies(chunks)])
    row |= _percentiles("icl", [gap for chunks in done for gap in metrics.inter_chunk_latencies(chunks)])
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
    correct = [row["correct"] for row in finished]
    return row | {
        "scored": len(correct),
        "correct": sum(correct),
        "accuracy": metrics.accuracy(correct),
        "accuracy_se": metrics.accuracy_standard_error(correct, [row["problem_id"] for row in finished]),
    }


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _spread(name: str, values: Sequence[float]) -> Row:
    return {f"{name}_mean": metrics.mean(values), f"{name}_sd": metrics.standard_deviation(values)}


def _percentiles(name: str, values: Sequence[float]) -> Row:
    ordered = sorted(values)
    return {f"{name}_p{percent}": metrics.percentile(ordered, percent) for percent in metrics.PERCENTILES}
