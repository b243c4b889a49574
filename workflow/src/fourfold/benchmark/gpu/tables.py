"""The benchmark's rows as tables on the terminal, one a part."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from fourfold.benchmark.rows import Row

Cell = Callable[[Row], str]
ACCEPTANCES = (2, 3, 4)


def show(rows: Sequence[Row]) -> None:
    """Prints a table for each part that there are rows of."""
    console = Console(width=150)
    for part, (title, columns) in TABLES.items():
        if not (chosen := [row for row in rows if row["part"] == part]):
            continue
        table = Table(title=f"{title}; {chosen[0]['device']}, {chosen[0]['date']}")
        for name in columns:
            table.add_column(name, justify="left" if name in ("Model", "Engine", "Problems") else "right")
        for row in chosen:
            table.add_row(*(cell(row) for cell in columns.values()))
        console.print(table)


def _over_bf16(row: Row) -> str:
    """How much faster than bf16; with drafts, at the acceptance lengths that they can reach."""
    if not row["drafts"]:
        return f"{row['over_bf16']:.2f}x"
    reached = [length for length in ACCEPTANCES if length <= row["drafts"] + 1]
    return ", ".join(f"{length * row['over_bf16']:.2f}x at {length}" for length in reached)


def _number(name: str, digits: int, suffix: str = "") -> Cell:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.{digits}f}{suffix}"


def _share(name: str) -> Cell:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.1%}"


def _text(name: str) -> Cell:
    return lambda row: "–" if row.get(name) is None else str(row[name])


_WHO: dict[str, Cell] = {
    "Model": _text("weights"),
    "Engine": _text("engine"),
    "Drafts": _text("shape"),
    "At once": _text("sequences"),
}
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "drafter": (
        "The drafter, trained here",
        {
            "Engine": _text("engine"),
            "Texts": _text("texts"),
            "Tokens": _text("text_tokens"),
            "Made in, s": _number("data_seconds", 1),
            "Steps": _text("training_steps"),
            "Step, ms": _number("training_step_ms", 2),
            "Trained in, s": _number("training_seconds", 1),
            "Best epoch": _text("best_epoch"),
            "Acceptance": _number("heldout_simulated_acceptance_length", 2),
        },
    ),
    "steps": (
        "Decoding steps",
        {
            **_WHO,
            "Context": _text("context"),
            "Temp.": _text("temperature"),
            "Step, ms": _number("step_ms", 2),
            "Captured, ms": _number("captured_ms", 2),
            "Host gap": _share("host_gap"),
            "Over bf16": _over_bf16,
        },
    ),
    "text": (
        "Held-out problems",
        {
            **_WHO,
            "Temp.": _text("temperature"),
            "Problems": _text("split"),
            "Tok/s a sequence": _number("sequence_throughput", 1),
            "Tok/s": _number("batch_throughput", 0),
            "Over bf16": _number("over_bf16", 2, "x"),
            "Acceptance": _number("acceptance_length", 2),
            "By position": _text("accepted_per_position"),
            "Right": lambda row: f"{row['right']}/{row['answers']}",
            "Equal": _text("equal_answers"),
            "First diff.": _text("first_difference"),
        },
    ),
    "best": (
        "The fastest drafts",
        {
            **_WHO,
            "Temp.": _text("temperature"),
            "Problems": _text("split"),
            "Tok/s a sequence": _number("sequence_throughput", 1),
            "Over bf16": _number("over_bf16", 2, "x"),
            "Over fp8": _number("over_plain", 2, "x"),
            "Acceptance": _number("acceptance_length", 2),
            "Break-even": _number("break_even", 2),
        },
    ),
    "oracle": (
        "Speed over acceptance, held",
        {
            **_WHO,
            "Context": _text("context"),
            "Held": _text("held_acceptance"),
            "Acceptance": _number("acceptance_length", 2),
            "Step, ms": _number("step_ms", 2),
            "Tok/s a sequence": _number("sequence_throughput", 1),
            "Over bf16": _number("over_bf16", 2, "x"),
        },
    ),
    "recipe": (
        "The recipe's workload: 12 generations, first 10 kept",
        {
            **_WHO,
            "Temp.": _text("temperature"),
            "Held": _text("held_acceptance"),
            "Acceptance": _number("acceptance_length", 2),
            "Tokens": _text("output_tokens"),
            "Total, s": _number("seconds", 1),
            "Tok/s": _number("batch_throughput", 0),
            "Over bf16": _number("over_bf16", 2, "x"),
        },
    ),
}
