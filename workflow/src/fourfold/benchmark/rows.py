"""CSV files of rows: numbers with eight significant digits, None as an empty field."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.artifacts.files import write_text

Row = dict[str, Any]
"""A row of a table, by column."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """Writes rows, whole or not at all; `columns`, then the others in order of first appearance, `\\n` line ends."""
    columns = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([format_field(row.get(name)) for name in columns] for row in rows)
    write_text(path, text.getvalue())


def format_field(value: Any) -> str:
    """A value as CSV text."""
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Reads rows; fields become int or float where they read as one, None where empty."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: parse_field(text) for name, text in row.items()} for row in csv.DictReader(file)]


def parse_field(text: str) -> Any:
    """The value of CSV text."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
