"""Plots of the engines' speed: throughput, latency, and speed against accuracy."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold.report.data import Results
from fourfold.report.labels import label_points
from fourfold.report.style import GRID, INK, MUTED, PAPER, engine_colours, light_grid, say_nothing_to_show

LATENCIES = (
    ("ttft", "Time to first token (ttft)"),
    ("tpot", "Time per output token (tpot)"),
    ("e2e_latency", "Whole answer (e2e_latency)"),
)


def plot_throughput(results: Results) -> Figure:
    """Output throughput of each engine, grouped by concurrency, with speed-ups over the first engine."""
    names = [engine.name for engine in results.engines]
    colours = engine_colours(names)
    groups = results.concurrencies
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    small = len(names) * len(groups) > 12
    for i, name in enumerate(names):
        for j, concurrency in enumerate(groups):
            row = results.row(name, concurrency)
            value = row["output_throughput"] if row else None
            if row is None or value is None:
                continue
            x = j + (i - (len(names) - 1) / 2) * width
            axes.bar(x, value, width * 0.9, color=colours[name], label=name if j == 0 else "_")
            _label_bar(axes, x, value, row["output_throughput_speedup"] if i else None, 7.5 if small else 9)
    axes.set_xticks(range(len(groups)), [f"{c} at once" for c in groups])
    axes.margins(x=0.05, y=0.2)
    axes.set_ylabel("tokens/s, all requests together")
    axes.set_title("Output throughput")
    light_grid(axes, "y")
    figure.legend(loc="outside lower center", ncols=min(len(names), 5))
    return figure


def _label_bar(axes: Axes, x: float, value: float, speedup: float | None, size: float) -> None:
    _above(axes, x, value, three_digits(value), 3, size, "normal")
    if speedup is not None:
        _above(axes, x, value, f"{speedup:.2f}×", 5 + size * 1.2, size, "bold")


def _above(axes: Axes, x: float, y: float, text: str, points: float, size: float, weight: str) -> None:
    """Text centred some points above a place."""
    place = (0, points)
    axes.annotate(
        text, (x, y), place, textcoords="offset points", ha="center", va="bottom", fontsize=size, fontweight=weight
    )


def three_digits(value: float) -> str:
    """A number with three digits that count, or all digits of its whole part."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def plot_latency(results: Results) -> Figure:
    """Percentiles of ttft, tpot and e2e latency: a dot at p50, a bar to p90, a line to p99."""
    names = [engine.name for engine in results.engines]
    colours = engine_colours(names)
    lines = [(c, name) for c in results.concurrencies for name in names if results.row(name, c)]
    figure = Figure(figsize=(8.0, 1.5 + 0.3 * len(lines) + 0.15 * len(results.concurrencies)), layout="constrained")
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    places = _places(lines)
    for axes, (metric, title) in zip(panels, LATENCIES, strict=True):
        most = max((row[f"{metric}_p99"] or 0.0 for c, name in lines if (row := results.row(name, c))), default=0.0)
        scale, unit = (1, "s") if most >= 2 else (1000, "ms")
        for y, (concurrency, name) in zip(places, lines, strict=True):
            row = results.row(name, concurrency)
            assert row is not None
            if row[f"{metric}_p50"] is None:
                axes.text(0, y, " no finished request", va="center", color=MUTED, fontsize=8)
                continue
            p50, p90, p99 = (row[f"{metric}_p{p}"] * scale for p in (50, 90, 99))
            axes.plot([p50, p99], [y, y], color=colours[name], linewidth=1.2, solid_capstyle="butt")
            axes.plot([p50, p90], [y, y], color=colours[name], linewidth=5, alpha=0.45, solid_capstyle="butt")
            axes.plot([p50], [y], "o", color=colours[name], markersize=7, markeredgecolor=PAPER)
            axes.annotate(
                three_digits(p50),
                (p50, y),
                (0, 5.5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel(unit)
        axes.set_xlim(0, 1.12 * max(most, 1e-9) * scale)
        light_grid(axes, "x")
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(places, [name for _, name in lines])
    panels[0].tick_params(axis="y", labelcolor=INK)
    panels[0].set_ylim(max(places) + 0.7, -1.2)
    for concurrency in results.concurrencies:
        first = next(y for y, (c, _) in zip(places, lines, strict=True) if c == concurrency)
        panels[0].annotate(
            f"{concurrency} at once",
            (0, first - 0.75),
            (-6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=MUTED,
            fontweight="bold",
        )
    legend = "dot: p50 (its value above) · thick bar: to p90 · thin line: to p99"
    figure.suptitle(legend, x=0.01, ha="left", fontsize=8, fontweight="normal", color=MUTED)
    return figure


def _places(lines: list[tuple[int, str]]) -> list[float]:
    """Vertical places of the lines, with room above each concurrency's first for its heading."""
    places: list[float] = []
    for i, (concurrency, _) in enumerate(lines):
        if i == 0:
            places.append(0.0)
        else:
            places.append(places[-1] + (1.0 if concurrency == lines[i - 1][0] else 2.0))
    return places


def plot_accuracy(results: Results) -> Figure:
    """Speed at the highest concurrency against accuracy over all answers: right is faster, up is more often right."""
    colours = engine_colours([engine.name for engine in results.engines])
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    points = []
    for engine in results.engines:
        row = max(engine.rows, key=lambda r: r["concurrency"])
        if engine.accuracy is not None and row["output_throughput"]:
            points.append((engine.name, row, engine.accuracy))
    if not points:
        say_nothing_to_show(figure, "No request finished, so no answer was scored.")
        return figure
    axes = figure.add_subplot()
    for name, row, score in points:
        x, y, error = row["output_throughput"], 100 * score.share, 100 * score.error
        axes.errorbar(
            x, y, yerr=error, fmt="o", color=colours[name], markersize=10, markeredgecolor=PAPER, elinewidth=1.8
        )
    low = min(100 * (score.share - score.error) for _, _, score in points)
    high = max(100 * (score.share + score.error) for _, _, score in points)
    room = max(5.0, 0.2 * (high - low))
    axes.set_ylim(max(-2.0, low - room), min(104.0, high + room))
    axes.set_xlim(0, 1.25 * max(row["output_throughput"] for _, row, _ in points))
    places = [(row["output_throughput"], 100 * score.share) for _, row, score in points]
    label_points(axes, [name for name, _, _ in points], places, [colours[name] for name, _, _ in points])
    concurrency = max(results.concurrencies)
    axes.set_xlabel(f"output throughput, tokens/s, {concurrency} at once")
    axes.set_ylabel("right answers, %")
    axes.set_title("Speed against accuracy")
    axes.grid(True, color=GRID)
    axes.tick_params(length=0)
    return figure
