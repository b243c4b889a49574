"""A load's results under the field names of `vllm bench serve --save-result`, for the tools that read those.

Times are milliseconds there, and `itl` is the gap between two chunks: with speculative decoding one chunk holds several
tokens, so it is `icl` in the other tables. Source of the names: vLLM, vllm/benchmarks/serve.py.
"""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from fourfold.benchmark import metrics
from fourfold.benchmark.run import WorkloadRun
from fourfold.client.times import RequestTimes
from fourfold.config.benchmark import BenchmarkSettings


def bench_serve_record(runs: list[WorkloadRun], line: dict[str, Any], settings: BenchmarkSettings) -> dict[str, Any]:
    """One load's record.

    Args:
        runs: its workloads; the duration is the sum of theirs.
        line: the load's row (`tables.load_row`).
        settings: the benchmark's.
    """
    requests = [request for run in runs for request in run.requests]
    done = [request.answer for request in requests if request.finished]
    duration = sum(run.total_generation_time for run in runs)
    read, written = sum(answer.prompt_tokens for answer in done), sum(answer.times.tokens for answer in done)
    load = runs[0].workload.load
    record: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "num_prompts": len(requests),
        "request_rate": load.request_rate or "inf",
        "burstiness": settings.burstiness,
        "max_concurrency": load.concurrency,
        "duration": duration,
        "completed": len(done),
        "failed": sum(request.answer.error is not None for request in requests),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(done) / duration,
        "request_goodput": line["request_goodput"],
        "output_throughput": written / duration,
        "total_token_throughput": (read + written) / duration,
        "max_output_tokens_per_s": max(busiest_second([r.answer.times for r in run.requests]) for run in runs),
        "max_concurrent_requests": max(most_at_once([r.answer.times for r in run.requests]) for run in runs),
    }
    latencies: dict[str, list[float | None]] = {
        "ttft": [metrics.ttft(answer.times) for answer in done],
        "tpot": [metrics.tpot(answer.times) for answer in done],
        "itl": [*(gap for answer in done for gap in metrics.inter_chunk_latencies(answer.times))],
        "e2el": [metrics.e2e_latency(answer.times) for answer in done],
    }
    for name, seconds in latencies.items():
        values = [1000 * value for value in seconds if value is not None]
        record |= {
            f"mean_{name}_ms": metrics.mean(values),
            f"median_{name}_ms": metrics.percentile(values, 50),
            f"std_{name}_ms": metrics.standard_deviation(values),
            **{f"p{percent}_{name}_ms": metrics.percentile(values, percent) for percent in metrics.PERCENTILES},
        }
    return record | _speculation(runs)


def _speculation(runs: list[WorkloadRun]) -> dict[str, Any]:
    """Acceptance, where there were drafts; the rate is in per cent."""
    stats = metrics.pool([request.answer.speculation for run in runs for request in run.requests])
    if not stats.num_drafts:
        return {}
    rate = metrics.acceptance_rate(stats)
    return {
        "spec_decode_acceptance_rate": None if rate is None else 100 * rate,
        "spec_decode_acceptance_length": metrics.acceptance_length(stats),
        "spec_decode_num_drafts": stats.num_drafts,
        "spec_decode_draft_tokens": stats.num_draft_tokens,
        "spec_decode_accepted_tokens": stats.num_accepted_tokens,
        "spec_decode_per_position_acceptance_rates": metrics.acceptance_rate_per_position(stats),
    }


def busiest_second(requests: list[RequestTimes]) -> int:
    """Most tokens received in one second, counted from the first request on."""
    start = min(request.sent for request in requests)
    seconds: Counter[int] = Counter()
    for request in requests:
        for at, size in zip(request.times, request.sizes, strict=True):
            seconds[int(at - start)] += size
    return max(seconds.values(), default=0)


def most_at_once(requests: list[RequestTimes]) -> int:
    """Most requests that were under way at one moment: sent, and their last chunk not come yet."""
    changes = sorted(change for r in requests if r.times for change in ((r.sent, 1), (r.finished or r.times[-1], -1)))
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
