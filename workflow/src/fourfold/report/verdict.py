"""The comparison in one sentence."""

import math

from fourfold.report.data import Results, Row


def best_engine(results: Results) -> str:
    """The engine with the highest throughput speed-up, as geometric mean over the concurrencies; the first if alone."""
    scores: dict[str, float] = {}
    for engine in results.engines:
        ratios = [row["output_throughput_speedup"] for row in engine.rows if row["output_throughput_speedup"]]
        if ratios:
            scores[engine.name] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    others = [engine.name for engine in results.engines[1:] if engine.name in scores]
    return max(others, key=lambda name: scores[name]) if others else results.baseline


def verdict(results: Results) -> str:
    """One sentence: the fastest engine against the first, at each concurrency, and their accuracies.

    The accuracies are those of the highest concurrency, where most answers were scored.
    """
    best, base = best_engine(results), results.baseline
    if best == base:
        alone = results.engines[0].rows[-1]
        return f"{base} generates {alone['output_throughput'] or 0:.1f} tokens/s {_load(alone)}."
    rows = [row for c in results.concurrencies if (row := results.row(best, c)) and row["output_throughput_speedup"]]
    *others, main = rows
    sentence = f"{best} generates tokens {main['output_throughput_speedup']:.2f}× as fast as {base} {_load(main)}"
    if others:
        sentence += f" ({', '.join(map(_speed, others))})"
    theirs = results.row(base, main["concurrency"])
    if theirs is not None and main["accuracy"] is not None and theirs["accuracy"] is not None:
        sentence += f", with accuracy {_accuracy(main)} against {_accuracy(theirs)}"
    return sentence + "."


def _speed(row: Row) -> str:
    return f"{row['output_throughput_speedup']:.2f}× {_load(row)}"


def _load(row: Row) -> str:
    return "one at a time" if row["concurrency"] == 1 else f"with {row['concurrency']} at once"


def _accuracy(row: Row) -> str:
    return f"{100 * row['accuracy']:.0f} % ± {100 * row['accuracy_se']:.0f}"
