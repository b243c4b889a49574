"""Names of the files that benchmark_engine writes: the workflow declares them as outputs (standard library only)."""

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
BENCHMARK = "benchmark.csv"
"""One row per concurrency."""
RATES = "rates.csv"
"""One row per request rate."""
BENCH_SERVE = "bench_serve.jsonl"
"""One line per load, with the field names of `vllm bench serve --save-result --append-result`."""
WORKLOADS = "workloads.csv"
"""One row per workload."""
REQUESTS = "requests.jsonl"
"""One line per request."""
PROBLEMS = "problems.jsonl"
"""The problems that were asked, with their answers."""
OVERHEAD = "overhead.csv"
"""Of measure_overhead: one row a measurement."""


def benchmark_files() -> tuple[str, ...]:
    """Names of all files in a benchmark's directory, the manifest first."""
    return (MANIFEST, PROVENANCE, BENCHMARK, RATES, BENCH_SERVE, WORKLOADS, REQUESTS, PROBLEMS)
