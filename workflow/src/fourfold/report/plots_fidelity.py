"""The plot of the accuracy gate: what engines may have lost, and how far their logits are from bf16's."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold.config.benchmark import ReportSettings
from fourfold.report.data import Results
from fourfold.report.gate import points
from fourfold.report.style import BAD, INK, MUTED, PAPER, engine_colours, light_grid, say_nothing_to_show


def plot_fidelity(results: Results, settings: ReportSettings) -> Figure:
    """Left: paired accuracy differences with their intervals. Right: KL of each numerics, text by text."""
    others = [engine for engine in results.engines[1:] if results.paired(engine) is not None]
    measured = list(results.fidelity)
    lines = max(len(others), len(measured))
    figure = Figure(figsize=(8.0, 1.7 + 0.45 * lines), layout="constrained")
    panels = [panel for panel in (others, measured) if panel]
    if not panels:
        say_nothing_to_show(figure, "A single engine in bf16: there is nothing to compare it with.")
        return figure
    axes = iter(figure.subplots(1, len(panels), squeeze=False)[0])
    if others:
        _differences(next(axes), results, settings.max_accuracy_drop)
    if measured:
        _divergences(next(axes), results, settings.max_kl)
    return figure


def _differences(axes: Axes, results: Results, allowed: float) -> None:
    colours = engine_colours([engine.name for engine in results.engines])
    named = [(engine.name, paired) for engine in results.engines[1:] if (paired := results.paired(engine)) is not None]
    for y, (name, paired) in enumerate(named):
        middle, low, high = (100 * value for value in (paired.difference, paired.low, paired.high))
        axes.plot([low, high], [y, y], color=colours[name], linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot([middle], [y], "o", color=colours[name], markersize=8, markeredgecolor=PAPER)
        _above(axes, middle, y, points(paired.difference))
    reach = 1.15 * max(allowed, *(100 * max(-paired.low, paired.high) for _, paired in named))
    axes.set_xlim(-min(reach, 105), min(reach, 105))
    axes.axvline(0, color=MUTED, linewidth=1)
    _limit(axes, -allowed, f"−{allowed:g} allowed", "right")
    _lines(axes, [name for name, _ in named])
    axes.set_title(f"Accuracy against {results.baseline}", fontsize=9.5)
    axes.set_xlabel("points, with 95 % interval")


def _divergences(axes: Axes, results: Results, allowed: float) -> None:
    colours = engine_colours([engine.name for engine in results.engines])
    values = [allowed]
    for y, (numerics, row) in enumerate(results.fidelity.items()):
        # The colour of the first engine that rounds so.
        colour = next((colours[engine.name] for engine in results.engines if engine.numerics == numerics), MUTED)
        texts = [text["kl"] for text in results.fidelity_texts[numerics]]
        axes.plot(texts, [y + 0.22] * len(texts), "|", color=colour, markersize=7, alpha=0.8)
        axes.plot([row["kl_low"], row["kl_high"]], [y, y], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot([row["kl"]], [y], "o", color=colour, markersize=8, markeredgecolor=PAPER)
        _above(axes, row["kl"], y, f"{row['kl']:#.2g}")
        values += [*texts, row["kl_low"], row["kl_high"]]
    axes.set_xlim(0, 1.25 * max(max(values), 1e-9))
    _limit(axes, allowed, f"{allowed:g} allowed", "left")
    _lines(axes, list(results.fidelity))
    axes.set_title("KL divergence from bf16", fontsize=9.5)
    axes.set_xlabel("nats a token, with 95 % interval; ticks below: texts")


def _limit(axes: Axes, x: float, text: str, side: str) -> None:
    """A dashed line at what is allowed, with its name at the top, on the side that is not."""
    axes.axvline(x, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
    offset = -4 if side == "right" else 4
    axes.annotate(
        text,
        (x, 1),
        (offset, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=side,
        va="top",
        fontsize=7.5,
        color=BAD,
    )


def _above(axes: Axes, x: float, y: float, text: str) -> None:
    # On paper of its own: lines may run behind it.
    paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
    place = (0, 7)
    axes.annotate(
        text, (x, y), place, textcoords="offset points", ha="center", va="bottom", fontsize=8, color=INK, bbox=paper
    )


def _lines(axes: Axes, names: list[str]) -> None:
    """One line a name, from the top, with room for the limit's name above them."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -1.0)
    light_grid(axes, "x")
    axes.spines["left"].set_visible(False)
