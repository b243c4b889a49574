"""The report stage: combined CSV, Table 1, plots, provenance and the overview."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from fourfold.artifacts import write_artifact
from fourfold.artifacts.files import write_text
from fourfold.benchmark.rows import write_csv
from fourfold.config.benchmark import ReportSettings
from fourfold.progress import logger
from fourfold.report import files, gate, pages, tables
from fourfold.report.data import Results, read_results
from fourfold.report.overview import overview
from fourfold.report.plots_drafter import plot_acceptance, plot_training
from fourfold.report.plots_fidelity import plot_fidelity
from fourfold.report.plots_speed import plot_accuracy, plot_latency, plot_throughput
from fourfold.report.provenance import provenance_rows, source_line, warnings
from fourfold.report.style import SETTINGS, footnote, save
from fourfold.report.verdict import verdict

DRAW: dict[str, Callable[[Results, ReportSettings], Figure]] = {
    "throughput": lambda results, _: plot_throughput(results),
    "latency": lambda results, _: plot_latency(results),
    "accuracy": lambda results, _: plot_accuracy(results),
    "fidelity": plot_fidelity,
    "training": lambda results, _: plot_training(results),
    "acceptance": lambda results, _: plot_acceptance(results),
}


def make_report(
    settings: ReportSettings,
    benchmarks: list[Path],
    drafter: Path | None,
    evaluation: Path | None,
    fidelity: list[Path],
    overhead: Path | None,
    output: Path,
) -> None:
    """Writes the files that `report.files` names; the same inputs give the same bytes.

    Args:
        settings: title, format of the plots, and the limits of the accuracy gate.
        benchmarks: manifests of the benchmarks; speed-ups refer to the first.
        drafter: manifest of the drafter, for its training curve.
        evaluation: manifest of the drafter's evaluation, for its acceptance.
        fidelity: manifests of the logits errors, one for each kind of rounding.
        overhead: manifest of what the server costs.
        output: manifest of the report.
    Raises FourfoldError when an artifact is missing or not a benchmark.
    """
    results = read_results(benchmarks, drafter, evaluation, fidelity, overhead)
    checks = gate.checks(results, settings)
    gate.add_columns(results, checks)
    inputs = {f"benchmark {engine.name}": path for engine, path in zip(results.engines, benchmarks, strict=True)}
    inputs |= {
        name: path
        for name, path in (("drafter", drafter), ("evaluation", evaluation), ("overhead", overhead))
        if path is not None
    }
    inputs |= {f"fidelity {numerics}": path for numerics, path in zip(results.fidelity, fidelity, strict=True)}
    with (
        write_artifact(
            output,
            stage="make_report",
            settings=settings.model_dump(),
            inputs=inputs,
            libraries=["matplotlib", "jinja2"],
        ) as staging,
        # The defaults first: a matplotlibrc of the user's does not change the report.
        matplotlib.style.context(["default", SETTINGS]),
    ):
        write_csv(staging.path / files.BENCHMARK, results.rows)
        write_tables(results, checks, staging.path)
        figures = {stem: DRAW[stem](results, settings) for stem in files.PLOTS}
        write_text(staging.path / files.OVERVIEW, overview(results, checks, figures, settings))
        for stem, figure in figures.items():
            footnote(figure, source_line(results))
            save(figure, staging.path / f"{stem}.{settings.plot_format}")
        staging.facts["gate"] = gate.worst(checks)
    logger.info("%s", verdict(results))
    logger.log(
        logging.INFO if gate.worst(checks) in (None, "pass") else logging.WARNING,
        "%s",
        gate.gate_sentence(checks, settings),
    )
    for warning in warnings(results):
        logger.warning("note: %s", warning)


def write_tables(results: Results, checks: Sequence[gate.Check], folder: Path) -> None:
    """Table 1, the accuracy gate and the provenance in all their forms."""
    rows, notes = tables.table1(results, checks), [*warnings(results), *tables.notes(results)]
    about = provenance_rows(results)
    write_csv(folder / "table1.csv", rows)
    write_text(folder / "table1.md", tables.markdown(rows, notes))
    page = pages.render(
        "table1",
        title="Comparison of engines",
        rows=rows,
        headings=tables.HEADINGS,
        notes=notes,
        fastest=tables.fastest(results),
    )
    write_text(folder / "table1.html", page)
    verdicts = gate.gate_rows(checks)
    write_csv(folder / "gate.csv", verdicts, gate.HEADINGS)
    write_text(
        folder / "gate.html",
        pages.render("gate", title="Accuracy gate", rows=verdicts, headings=gate.HEADINGS, notes=gate.NOTES),
    )
    write_csv(folder / "provenance.csv", about)
    write_text(
        folder / "provenance.html",
        pages.render("provenance", title="What made the numbers", rows=about, warnings=warnings(results)),
    )
