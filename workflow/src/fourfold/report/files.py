"""Names of the files that make_report writes: what the workflow declares as its outputs.

Only the standard library is imported, so that a Snakefile can read the names without cost.
"""

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
BENCHMARK = "benchmark.csv"
"""One row per engine and concurrency, with speed-ups against the first engine."""
TABLES = ("table1.csv", "table1.md", "table1.html", "gate.csv", "gate.html", "provenance.csv", "provenance.html")
"""Table 1 (the recipe's), the accuracy gate and what made the numbers, each in several forms."""
PLOTS = ("throughput", "latency", "accuracy", "fidelity", "training", "acceptance")
"""Stems of the plots; all are always written (a plot without data says so)."""
OVERVIEW = "overview.html"
"""One self-contained page with everything on it."""


def report_files(plot_format: str = "svg") -> tuple[str, ...]:
    """Names of all files in the report's directory, the manifest first.

    Args:
        plot_format: `svg` or `png`, as in the configuration's `report.plot_format`.
    """
    plots = tuple(f"{stem}.{plot_format}" for stem in PLOTS)
    return (MANIFEST, PROVENANCE, BENCHMARK, *TABLES, *plots, OVERVIEW)
