"""How the plots look, and how they are written: the same bytes for the same numbers."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, PAPER, BAD = "#1f2430", "#6a7280", "#e2e5ea", "#ffffff", "#b83a4f"
"""Colours of text, secondary text, lines, background and limits; the overview turns them into CSS variables."""
CSS_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", BAD: "var(--bad)"}
BASELINE_COLOUR = "#8d95a3"
ENGINE_COLOURS = ("#2f6fdd", "#e07b28", "#1f9d74", "#8e5bd1", "#c8465f", "#1794ad", "#9a7b1c", "#b1569a")

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2.0,
}
FONTS = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
"""Fonts of the SVGs' text: what the reader's system has."""


def engine_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour of each engine, the same in every plot: the baseline grey, the others from a fixed list."""
    return {
        name: BASELINE_COLOUR if i == 0 else ENGINE_COLOURS[(i - 1) % len(ENGINE_COLOURS)]
        for i, name in enumerate(names)
    }


def light_grid(axes: Axes, axis: str) -> None:
    """Grid lines along one axis only, without ticks or the spine across them."""
    axes.grid(True, axis="x" if axis == "x" else "y")
    axes.tick_params(length=0)
    axes.spines["left" if axis == "y" else "bottom"].set_visible(False)


def say_nothing_to_show(figure: Figure, message: str) -> None:
    """A plot without data says why."""
    figure.text(0.5, 0.5, message, ha="center", va="center", color=MUTED, fontsize=11)


def footnote(figure: Figure, text: str) -> None:
    """A small line at the bottom left: where the numbers come from."""
    inches = figure.get_size_inches()[1]
    layout = figure.get_layout_engine()
    if isinstance(layout, ConstrainedLayoutEngine):
        layout.set(rect=(0, 0.22 / inches, 1, 1 - 0.22 / inches))
    figure.text(0.01, 0.06 / inches, text, ha="left", va="bottom", color=MUTED, fontsize=7.5)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as its suffix says, without dates or random ids."""
    if path.suffix == ".svg":
        path.write_text(to_svg(figure, path.stem), encoding="utf-8")
    else:
        figure.savefig(path, dpi=160, metadata={"Software": None})


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG text; the same figure and `name` give the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, buffer.getvalue())


def to_inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: its colours follow the page's, its ids are unique.

    Args:
        figure: what to draw.
        name: prefix of the element's ids.
        label: what the picture shows, for readers who do not see it; plain text.
    """
    text = to_svg(figure, name)
    text = text[text.index("<svg") :]
    for colour, variable in CSS_COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # Without width and height it fills the page's column.
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'
