"""Names of the files that benchmark_engine writes: the workflow declares them as outputs (standard library only)."""

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
BENCHMARK = "benchmark.csv"
"""One row per concurrency."""
WORKLOADS = "workloads.csv"
"""One row per workload."""
REQUESTS = "requests.jsonl"
"""One line per request."""
PROBLEMS = "problems.jsonl"
"""The problems that were asked, with their answers."""


def benchmark_files() -> tuple[str, ...]:
    """Names of all files in a benchmark's directory, the manifest first."""
    return (MANIFEST, PROVENANCE, BENCHMARK, WORKLOADS, REQUESTS, PROBLEMS)
