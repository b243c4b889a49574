"""Rows of figures as CSV."""

import csv
import io
from typing import Any


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV, fractions to six digits, None as an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()
