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
    """One sentence: the fastest engine against the first at the highest and the lowest concurrency, and accuracies.

    The accuracies are over all answers of each engine.
    """
    best, base = best_engine(results), results.baseline
    if best == base:
        alone = max(results.engines[0].rows, key=lambda row: row["concurrency"])
        return f"{base} generates {alone['output_throughput'] or 0:.1f} tokens/s {_load(alone)}."
    found = (results.row(best, concurrency) for concurrency in results.concurrencies)
    rows = [row for row in found if row and row["output_throughput_speedup"]]
    sentence = f"{best} is {rows[-1]['output_throughput_speedup']:.2f}× as fast as {base} {_load(rows[-1])}"
    if len(rows) > 1:
        sentence += f" and {rows[0]['output_throughput_speedup']:.2f}× {_load(rows[0])}"
    scores = {engine.name: engine.accuracy for engine in results.engines}
    if scores[best] is not None and scores[base] is not None:
        sentence += f"; accuracy {scores[best]} against {scores[base]}"
    return sentence + "."


def _load(row: Row) -> str:
    return "with one request" if row["concurrency"] == 1 else f"with {row['concurrency']} at once"
