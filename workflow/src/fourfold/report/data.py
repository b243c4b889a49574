"""What the report shows: the benchmarks' rows beside each other, with speed-ups against the first engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.artifacts import read_manifest, read_provenance
from fourfold.artifacts.files import read_jsonl
from fourfold.benchmark import files, metrics
from fourfold.benchmark.rows import read_csv
from fourfold.config.engine import EngineSettings
from fourfold.errors import FourfoldError
from fourfold.fidelity import files as fidelity_files
from fourfold.fidelity.paired import PairedDifference, paired_difference

Row = dict[str, Any]
SPEEDUPS = {
    "output_throughput_speedup": "output_throughput",
    "request_throughput_speedup": "request_throughput_mean",
    "decode_throughput_speedup": "decode_throughput_mean",
}
"""Column → the throughput whose ratio to the first engine's at the same concurrency it is."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, its standard error (both 0 to 1), and how many were scored."""

    share: float
    error: float
    scored: int

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} % ± {100 * self.error:.0f}"


@dataclass
class EngineBenchmark:
    """One engine's benchmark: manifest, provenance, a row for each concurrency, its requests, the problems asked."""

    name: str
    manifest: Row
    provenance: Row
    rows: list[Row]
    requests: list[Row]
    problems: list[Row]
    rates: list[Row] = field(default_factory=list)
    """A row for each request rate."""

    @property
    def accuracy(self) -> "Accuracy | None":
        """Accuracy over all finished requests, whatever the concurrency; None without any.

        How many requests run at once does not change what a model answers, so all answers count alike.
        """
        scored = [row for row in self.requests if row["correct"] is not None]
        correct, problems = [row["correct"] for row in scored], [row["problem_id"] for row in scored]
        share, error = metrics.accuracy(correct), metrics.accuracy_standard_error(correct, problems)
        return None if share is None or error is None else Accuracy(share, error, len(scored))

    @property
    def precision(self) -> str:
        """bf16, fp8 or int8_wo."""
        return str(self.manifest["engine_info"]["precision"])

    @property
    def numerics(self) -> str:
        """Name of all that its numbers are rounded to."""
        return EngineSettings.model_validate(self.manifest["engine_settings"]).numerics

    @property
    def drafts(self) -> bool:
        """Whether it has a drafter."""
        return bool(self.manifest["engine_info"]["drafter"] != "none")

    @property
    def greedy(self) -> bool:
        """Whether its answers were decoded at temperature 0."""
        return bool(self.manifest["settings"]["benchmark"]["temperature"] == 0)

    @property
    def emulates_fp8(self) -> bool:
        """Whether FP8 weights were computed with on a device without FP8 arithmetic."""
        return bool(self.manifest["engine_info"]["fp8_emulated"])


@dataclass
class Results:
    """All that the report is made of."""

    engines: list[EngineBenchmark]
    training: list[Row] = field(default_factory=list)
    """Rows of the drafter's training.csv."""
    evaluation: list[Row] = field(default_factory=list)
    """Rows of the evaluation's summary.csv."""
    overhead: list[Row] = field(default_factory=list)
    """Rows of overhead.csv: the engine with a server and without."""
    fidelity: dict[str, Row] = field(default_factory=dict)
    """Numerics → the row of its summary.csv: its logits error."""
    fidelity_texts: dict[str, list[Row]] = field(default_factory=dict)
    """Numerics → the rows of its texts.csv."""

    @property
    def rows(self) -> list[Row]:
        """All engines' rows, in the engines' order."""
        return [row for engine in self.engines for row in engine.rows]

    @property
    def concurrencies(self) -> list[int]:
        """The concurrencies measured, ascending."""
        return sorted({row["concurrency"] for row in self.rows})

    @property
    def baseline(self) -> str:
        """Name of the engine that speed-ups refer to: the first."""
        return self.engines[0].name

    def paired(self, engine: EngineBenchmark) -> PairedDifference | None:
        """Accuracy of an engine less the first one's, over the requests that both finished; None without any."""
        return paired_difference(engine.requests, self.engines[0].requests)

    def row(self, engine: str, concurrency: int) -> Row | None:
        """The row of an engine at a concurrency, if it was measured."""
        return next((r for r in self.rows if r["engine"] == engine and r["concurrency"] == concurrency), None)


def read_results(
    benchmarks: list[Path],
    drafter: Path | None,
    evaluation: Path | None,
    fidelity: list[Path],
    overhead: Path | None = None,
) -> Results:
    """Reads the artifacts. Raises FourfoldError when one is cut, or when two benchmarks are of the same engine."""
    if not benchmarks:
        raise FourfoldError("--benchmark: give at least one benchmark's manifest.json")
    engines = [_read_benchmark(path) for path in benchmarks]
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise FourfoldError(f"--benchmark: each engine once, but given were {', '.join(names)}")
    results = Results(engines)
    if drafter is not None:
        read_manifest(drafter)
        results.training = read_csv(drafter.parent / "training.csv")
    if evaluation is not None:
        read_manifest(evaluation)
        results.evaluation = read_csv(evaluation.parent / "summary.csv")
    if overhead is not None:
        read_manifest(overhead, "measure_overhead")
        results.overhead = read_csv(overhead.parent / files.OVERHEAD)
    for path in fidelity:
        numerics = read_manifest(path, "compare_logits")["numerics"]
        (results.fidelity[numerics],) = read_csv(path.parent / fidelity_files.SUMMARY)
        results.fidelity_texts[numerics] = read_csv(path.parent / fidelity_files.TEXTS)
    add_speedups(results)
    return results


def _read_benchmark(manifest: Path) -> EngineBenchmark:
    content = read_manifest(manifest, "benchmark_engine")
    folder = manifest.parent
    rows, rates = read_csv(folder / files.BENCHMARK), read_csv(folder / files.RATES)
    for row in (*rows, *rates):
        row["engine"] = content["engine"]  # an engine's name may read as a number
    return EngineBenchmark(
        content["engine"],
        content,
        read_provenance(manifest),
        rows,
        read_jsonl(folder / files.REQUESTS),
        read_jsonl(folder / files.PROBLEMS),
        rates,
    )


def add_speedups(results: Results) -> None:
    """Adds the speed-up columns to every row, behind the throughput columns they are made of."""
    for row in results.rows:
        base = results.row(results.baseline, row["concurrency"])
        for name, source in SPEEDUPS.items():
            ours, theirs = row[source], base[source] if base else None
            row[name] = ours / theirs if ours and theirs else None
