"""Plots of the drafter: its training, and the acceptance of its drafts."""

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold.report.data import Results, Row
from fourfold.report.style import ENGINE_COLOURS, INK, engine_colours, light_grid, say_nothing_to_show

Series = tuple[str, list[float], str]
"""Label, values by position, colour."""
TRAIN_COLOUR, HELDOUT_COLOUR = "#8d95a3", "#2f6fdd"
EVALUATION_COLOURS = ("#6a7280", "#a3abb8", "#4a5160", "#c3c9d2")
"""Greys, so that they are not taken for engines'; they repeat."""


def plot_training(results: Results) -> Figure:
    """The drafter's loss, its first choice's accuracy at each position, and what that would make a step yield."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    rows = results.training
    if not rows:
        say_nothing_to_show(figure, "No engine of this run has a drafter.")
        return figure
    train = [row for row in rows if row["split"] == "train"]
    heldout = [row for row in rows if row["split"] == "heldout"]
    loss, top1, length = figure.subplots(1, 3)
    if train:
        loss.plot(*_series(train, "loss"), color=TRAIN_COLOUR, linewidth=1.2, label="training")
    if heldout:
        loss.plot(*_series(heldout, "loss"), "o-", color=HELDOUT_COLOUR, markersize=4, label="held out")
    loss.set_title("Loss")
    loss.legend(fontsize=8.5)
    split, name = (heldout, "held out") if heldout else (train, "training")
    for i, column in enumerate(c for c in rows[0] if re.fullmatch(r"redrafter\d+_top1", c)):
        x, y = _series(split, column)
        colour = ENGINE_COLOURS[i % len(ENGINE_COLOURS)]
        top1.plot(x, [100 * v for v in y], "o-", color=colour, markersize=4, label=f"position {i + 1}")
    top1.set_title(f"First choice right, % ({name})")
    top1.legend(fontsize=8.5)
    x, y = _series(split, "simulated_acceptance_length")
    length.plot(x, y, "o-", color=HELDOUT_COLOUR, markersize=4)
    if y:
        length.annotate(
            f"{y[-1]:.2f}", (x[-1], y[-1]), (0, 7), textcoords="offset points", ha="center", fontweight="bold"
        )
    length.set_title(f"Tokens a step ({name})")
    for axes in (loss, top1, length):
        axes.set_xlabel("optimiser step")
        axes.title.set_fontsize(9.5)
        axes.margins(x=0.08, y=0.15)
        light_grid(axes, "y")
    return figure


def _series(rows: list[Row], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column, where it has a value."""
    kept = [row for row in rows if row.get(column) is not None]
    return [row["step"] for row in kept], [row[column] for row in kept]


def plot_acceptance(results: Results) -> Figure:
    """Share of verifications that accepted each draft position and all before it, for engine and evaluation."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    series = [*_engine_series(results), *_evaluation_series(results)]
    if not series:
        say_nothing_to_show(figure, "No engine of this run drafts.")
        return figure
    axes = figure.add_subplot()
    positions = max(len(rates) for _, rates, _ in series)
    width = 0.8 / len(series)
    for i, (label, rates, colour) in enumerate(series):
        offset = (i - (len(series) - 1) / 2) * width
        for position, rate in enumerate(rates):
            x = position + offset
            axes.bar(x, 100 * rate, width * 0.9, color=colour, label=label if position == 0 else "_")
            _percent(axes, x, 100 * rate, 7.5 if len(series) * positions > 14 else 9)
    axes.set_xticks(range(positions), [f"draft token {i + 1}" for i in range(positions)])
    axes.set_ylim(0, 105)
    axes.set_ylabel("accepted, % of verifications")
    axes.set_title("Acceptance by draft position (with all positions before it)")
    light_grid(axes, "y")
    figure.legend(loc="outside lower center", ncols=min(len(series), 2), fontsize=8.5)
    return figure


def _percent(axes: Axes, x: float, value: float, size: float) -> None:
    axes.annotate(f"{value:.0f}", (x, value), (0, 3), textcoords="offset points", ha="center", fontsize=size, color=INK)


def rates_of(row: Row) -> list[float]:
    """Acceptance rates by position of a row."""
    columns = sorted(
        (c for c in row if re.fullmatch(r"(acceptance_)?rate_\d+", c)), key=lambda c: int(c.split("_")[-1])
    )
    return [row[c] for c in columns if row[c] is not None]


def _engine_series(results: Results) -> list[Series]:
    """One series an engine that drafts: its highest concurrency, where most verifications were counted."""
    colours = engine_colours([engine.name for engine in results.engines])
    series: list[Series] = []
    for engine in results.engines:
        row = max((r for r in engine.rows if rates_of(r)), key=lambda r: r["concurrency"], default=None)
        if row is not None:
            label = f"{engine.name}, {row['concurrency']} at once: {row['acceptance_length']:.2f} tokens a step*"
            series.append((label, rates_of(row), colours[engine.name]))
    return series


def _evaluation_series(results: Results) -> list[Series]:
    """One series for each kind of groups at each temperature."""
    rows = [row for row in results.evaluation if rates_of(row)]
    return [
        (
            f"evaluation, {row['groups']} groups, {_temperature(row)}: {row['acceptance_length']:.2f} tokens a step*",
            rates_of(row),
            EVALUATION_COLOURS[i % len(EVALUATION_COLOURS)],
        )
        for i, row in enumerate(rows)
    ]


def _temperature(row: Row) -> str:
    return f"temperature {row['temperature']:g}" if row["temperature"] else "greedy"
