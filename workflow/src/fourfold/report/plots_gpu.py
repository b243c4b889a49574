"""Plot of the GPU benchmark: speed over an acceptance that was held, against bf16."""

from pathlib import Path

from matplotlib.figure import Figure

from fourfold.artifacts.files import write_text
from fourfold.benchmark.rows import read_csv
from fourfold.errors import FourfoldError
from fourfold.report.data import Row
from fourfold.report.style import BASELINE_COLOUR, ENGINE_COLOURS, footnote, light_grid, to_svg


def plot_gpu(rows: Path, output: Path) -> None:
    """Draws the rows of part oracle: a line for each context, engine and number of drafts.

    Args: CSV file of `fourfold bench-gpu`; SVG file to write.
    Raises FourfoldError when no acceptance was held.
    """
    chosen = [row for row in read_csv(rows) if row.get("part") == "oracle" and row["drafts"]]
    if not chosen:
        raise FourfoldError(f"{rows} has no rows of part oracle; run bench-gpu with --parts oracle")
    write_text(output, to_svg(curve(chosen), output.stem))


def curve(rows: list[Row]) -> Figure:
    """The figure. rows: of part oracle, with drafts."""
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    axes = figure.subplots()
    contexts = sorted({row["context"] for row in rows})
    for i, context in enumerate(contexts):
        kinds = sorted({(row["engine"], row["drafts"]) for row in rows})
        for style, kind in zip(("-", "--", ":"), kinds, strict=False):
            line = [row for row in rows if (row["engine"], row["drafts"]) == kind and row["context"] == context]
            line.sort(key=lambda row: row["acceptance_length"])
            axes.plot(
                [row["acceptance_length"] for row in line],
                [row["over_bf16"] for row in line],
                f"o{style}",
                color=ENGINE_COLOURS[i % len(ENGINE_COLOURS)],
                markersize=4,
                label=f"{kind[0]}, {kind[1]} drafts, context {context:,}",
            )
    axes.axhline(1, color=BASELINE_COLOUR, linewidth=1.2)
    axes.annotate("bf16", (axes.get_xlim()[1], 1), (-2, 4), textcoords="offset points", ha="right")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Tokens/s over bf16, {rows[0]['sequences']} sequences")
    axes.set_xlabel("acceptance length, measured")
    axes.legend(fontsize=8.5)
    light_grid(axes, "y")
    footnote(figure, f"{rows[0]['device']}, {rows[0]['weights']} weights, {rows[0]['date']}, torch {rows[0]['torch']}")
    return figure
