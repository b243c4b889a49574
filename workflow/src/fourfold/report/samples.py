"""Answers of the engines to the same problems, side by side."""

import math

from fourfold.report.data import EngineBenchmark, Results, Row

MAX_CHARACTERS = 1500


def samples(results: Results, count: int = 3) -> list[Row]:
    """The first problems with an answer of every engine each.

    Every engine's answer is its first one at the lowest concurrency: the engines got the same seeds there.
    Returns [{problem, answer, answers: [{engine, text, answer, correct, finish_reason, output_tokens, e2e_latency}]}].
    """
    found = []
    for problem in results.engines[0].problems:
        answers = [row for engine in results.engines if (row := _first(engine, problem["id"])) is not None]
        if len(answers) == len(results.engines):
            found.append({"problem": problem["problem"], "answer": problem["answer"], "answers": answers})
        if len(found) == count:
            break
    return found


def _first(engine: EngineBenchmark, problem: str) -> Row | None:
    rows = [row for row in engine.requests if row["problem_id"] == problem and row["correct"] is not None]
    if not rows:
        return None
    # Requests at a rate have no concurrency and come last.
    row = dict(min(rows, key=lambda r: (r["concurrency"] or math.inf, r["repeat"], r["workload"], r["index"])))
    if len(row["text"]) > MAX_CHARACTERS:
        row["text"] = row["text"][:MAX_CHARACTERS].rstrip() + " …"
    return row
