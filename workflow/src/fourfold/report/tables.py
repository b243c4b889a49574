"""Table 1, the recipe's comparison of engines, and its forms: rows of text for CSV, Markdown and HTML."""

from collections.abc import Sequence

from fourfold.benchmark.added_time import sentence
from fourfold.report.data import Results, Row
from fourfold.report.gate import Check, engine_verdicts

HEADINGS = {
    "concurrency": "At once",
    "engine": "Engine",
    "total_generation_time": "Total generation time, s",
    "output_throughput": "Batch throughput, tok/s",
    "request_throughput": "Per-request throughput, tok/s",
    "speedup": "Speed-up",
    "acceptance_length": "Acceptance length*",
    "accuracy": "Accuracy",
    "gate": "Accuracy gate",
}
NOTES = (
    "Total generation time: all workloads together, from submission to the stop. Batch throughput: all tokens "
    "generated until the stop, those of cancelled requests included, by that time; in brackets the 95 % interval over "
    "the repeats, if there were several. Per-request throughput: a finished "
    "request's tokens by its own latency, mean ± standard deviation. Speed-up: batch throughput against the first "
    "engine at the same concurrency. Accuracy: right answers ± standard error clustered by problem (right / scored); "
    "answers cut at the token limit count as wrong, cancelled ones are not scored. Accuracy gate: the gravest verdict "
    "on what the engine may have lost; it has a table of its own.",
    "* Tokens a verification step yields: 1 + accepted / drafts. It counts the bonus token.",
)
RATE_HEADINGS = {
    "request_rate": "Requests/s",
    "engine": "Engine",
    "requests": "Requests",
    "output_throughput": "Throughput, tok/s",
    "ttft": "ttft, median (p99), s",
    "tpot": "tpot, median (p99), ms",
    "e2e_latency": "e2e_latency, median (p99), s",
    "goodput": "Goodput, requests/s",
}
MINUS = "–"


def table1(results: Results, checks: Sequence[Check]) -> list[Row]:
    """Rows of Table 1 as text, by concurrency, engines in order; keys are those of HEADINGS."""
    verdicts = engine_verdicts(checks)
    rows = [results.row(engine.name, c) for c in results.concurrencies for engine in results.engines]
    return [{**_format(row), "gate": verdicts.get(row["engine"]) or MINUS} for row in rows if row is not None]


def notes(results: Results) -> list[str]:
    """What stands below Table 1."""
    return [*NOTES, *([sentence(results.overhead)] if results.overhead else [])]


def rate_rows(results: Results) -> list[Row]:
    """Rows of the open loop as text, by request rate, engines in order; keys are those of RATE_HEADINGS."""
    rows = [row for engine in results.engines for row in engine.rates]
    return [
        {
            "request_rate": f"{row['request_rate']:g}",
            "engine": row["engine"],
            "requests": str(row["requests"]),
            "output_throughput": number(row["output_throughput"], 1),
            "ttft": _percentiles(row, "ttft", 1, 2),
            "tpot": _percentiles(row, "tpot", 1000, 1),
            "e2e_latency": _percentiles(row, "e2e_latency", 1, 2),
            "goodput": number(row["request_goodput"], 2),
        }
        for row in sorted(rows, key=lambda row: float(row["request_rate"]))
    ]


def _percentiles(row: Row, name: str, unit: float, digits: int) -> str:
    middle, most = row[f"{name}_p50"], row[f"{name}_p99"]
    return MINUS if middle is None else f"{unit * middle:.{digits}f} ({unit * most:.{digits}f})"


def fastest(results: Results) -> list[tuple[str, str]]:
    """(concurrency, engine) of the highest speed-up at each concurrency, as text; none where no engine gains."""
    found = []
    for concurrency in results.concurrencies:
        rows = [row for row in results.rows if row["concurrency"] == concurrency]
        best = max(rows, key=lambda row: row["output_throughput_speedup"] or 0.0)
        if (best["output_throughput_speedup"] or 0.0) > 1:
            found.append((str(concurrency), best["engine"]))
    return found


def _format(row: Row) -> Row:
    return {
        "concurrency": str(row["concurrency"]),
        "engine": row["engine"],
        "total_generation_time": number(row["total_generation_time"], 1),
        "output_throughput": number(row["output_throughput"], 1) + between(row, "output_throughput"),
        "request_throughput": spread(row["request_throughput_mean"], row["request_throughput_sd"]),
        "speedup": MINUS if row["output_throughput_speedup"] is None else f"{row['output_throughput_speedup']:.2f}×",
        "acceptance_length": number(row["acceptance_length"], 2),
        "accuracy": accuracy(row),
    }


def number(value: float | None, digits: int) -> str:
    """A number with fixed digits; a dash for None."""
    return MINUS if value is None else f"{value:.{digits}f}"


def between(row: Row, name: str) -> str:
    """A value's 95 % interval in brackets; nothing without repeats."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"


def spread(middle: float | None, deviation: float | None) -> str:
    """Mean ± standard deviation."""
    return MINUS if middle is None or deviation is None else f"{middle:.1f} ± {deviation:.1f}"


def accuracy(row: Row) -> str:
    """Accuracy ± standard error in per cent, with the counts."""
    if row["accuracy"] is None:
        return MINUS
    return f"{100 * row['accuracy']:.0f} % ± {100 * row['accuracy_se']:.0f} ({row['correct']}/{row['scored']})"


def markdown(rows: list[Row], notes: list[str]) -> str:
    """Table 1 as Markdown, with notes below."""
    lines = ["| " + " | ".join(HEADINGS.values()) + " |"]
    lines.append("|" + "|".join("---" if key == "engine" else "---:" for key in HEADINGS) + "|")
    lines += ["| " + " | ".join(row[key] for key in HEADINGS) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"
