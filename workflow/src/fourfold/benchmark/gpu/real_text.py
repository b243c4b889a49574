"""Answers to held-out problems: speed, acceptance and accuracy of each precision, with and without drafts.

Requests are submitted in whole batches, as many at once as decode at once. Drafts change no token but near ties, which
steps of another size may round the other way on a GPU: how many answers are equal to plain decoding's is measured.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from fourfold.benchmark import metrics
from fourfold.benchmark.answers import extract_answer
from fourfold.benchmark.gpu.models import Measured
from fourfold.benchmark.gpu.steps import draft_columns, requests
from fourfold.benchmark.rows import Row
from fourfold.benchmark.workload import request_seed
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import NO_DRAFTS, DraftShape
from fourfold.engine.requests import RequestOutput
from fourfold.problems.read import Problem, Split

MOST_BATCHES = 6

Same = Callable[[str | None, str], bool]
"""An answer and the expected one → whether they are equal."""


@dataclass(frozen=True)
class TextCase:
    """What is asked."""

    sequences: int
    temperature: float
    split: Split


@dataclass
class Answers:
    """What came of it."""

    problems: list[Problem]
    outputs: list[RequestOutput]
    speeds: list[float]
    """Tokens/s of each sequence that decoded, from when its batch's prompts had been read."""
    seconds: float
    """From the submission of each batch to its end."""


def text_rows(
    made: Measured,
    sequences: int,
    temperatures: list[float],
    splits: tuple[Split, ...],
    precisions: tuple[str, ...],
    shapes: list[DraftShape],
    answers: int,
    max_tokens: int,
    same: Same,
) -> Iterator[Row]:
    """A row for each engine, temperature and split: each precision; fp8 with drafts of each shape, the others with the
    first of them.

    Args:
        made: models with real text.
        sequences: how many decode at once.
        temperatures: 0 is greedy.
        splits: benchmark, held-out problems of templates that the drafter was trained on, and unseen, of others.
        precisions: of `made`, bf16 and fp8 among them.
        shapes: what is drafted, each of them measured.
        answers: about how many to each split; whole batches of `sequences`, 6 at most.
        max_tokens: longest answer.
        same: compares answers.
    """
    assert made.text is not None
    cases = [TextCase(sequences, temperature, split) for temperature in temperatures for split in splits]
    count = sequences * max(1, min(MOST_BATCHES, answers // sequences))
    asked = {split: _fill(made.text.problems[split], count) for split in splits}
    prompts = {problem.id: made.text.prompt(problem) for problems in asked.values() for problem in problems}
    length = max(map(len, prompts.values())) + max_tokens
    plain: dict[tuple[str, TextCase], Answers] = {}
    speeds: dict[TextCase, float] = {}
    plainly = [(precision, NO_DRAFTS) for precision in precisions]
    drafted = [("fp8", shape) for shape in shapes]
    drafted += [(precision, shapes[0]) for precision in precisions if precision != "fp8"]
    for precision, shape in [*plainly, *drafted]:
        engine = made.engine(precision, shape, sequences, length)
        for case in cases:
            capture_steps(engine, prompts[asked[case.split][0].id], case)
            got = _ask(engine, case, asked[case.split], prompts, max_tokens)
            row = _row(made, precision, shape, case, got, same)
            if (precision, shape) == ("bf16", NO_DRAFTS):
                speeds[case] = row["sequence_throughput"]
            row["over_bf16"] = row["sequence_throughput"] / speeds[case]
            if shape != NO_DRAFTS:
                reference = plain[precision, case]
                row |= equality(reference.outputs, got.outputs)
                row["over_plain"] = row["sequence_throughput"] / _mean(reference.speeds)
                # What a drafted step costs in plain ones: below this acceptance length, drafting loses.
                row["break_even"] = row["acceptance_length"] / row["over_plain"]
            else:
                plain[precision, case] = got
            yield row


def _fill(problems: list[Problem], count: int) -> list[Problem]:
    return [problems[i % len(problems)] for i in range(count)]


def capture_steps(engine: LLMEngine, prompt: list[int], case: TextCase) -> None:
    """Runs each number of sequences that a step is captured for, so that none is captured while times are taken."""
    graphs = engine.decoder.graphs
    numbers = range(1, case.sequences + 1)
    for number in sorted({case.sequences} if graphs is None else {graphs.slots(running) for running in numbers}):
        # One token of the prompt's, and one of a step's.
        engine.generate([prompt] * number, requests([2] * number, case.temperature))


def _ask(
    engine: LLMEngine, case: TextCase, problems: list[Problem], prompts: dict[str, list[int]], max_tokens: int
) -> Answers:
    got = Answers(problems, [], [], 0.0)
    for start in range(0, len(problems), case.sequences):
        outputs: dict[str, RequestOutput] = {}
        begin = time.perf_counter()
        for i, problem in enumerate(problems[start : start + case.sequences], start):
            seed = request_seed(0, 0, case.sequences, problem.id, i)
            params = SamplingParams(max_tokens=max_tokens, temperature=case.temperature, seed=seed)
            outputs[engine.add_request(prompts[problem.id], params)] = RequestOutput("", [])
        while engine.num_waiting:
            outputs |= {output.request_id: output for output in engine.step()}
        read = time.perf_counter()
        while engine.has_unfinished:
            outputs |= {output.request_id: output for output in engine.step()}
        got.seconds += time.perf_counter() - begin
        got.outputs.extend(outputs.values())
        for output in outputs.values():
            # The prompts of a batch are read one after the other: a sequence's speed counts from the last one on.
            if output.finished_time is not None and output.finished_time > read:
                got.speeds.append((len(output.token_ids) - 1) / (output.finished_time - read))
    return got


def _row(made: Measured, precision: str, shape: DraftShape, case: TextCase, got: Answers, same: Same) -> Row:
    stats = metrics.pool([output.speculation for output in got.outputs])
    tokens = sum(len(output.token_ids) for output in got.outputs)
    right = [
        output.finish_reason == "stop" and same(extract_answer(output.text), problem.answer)
        for problem, output in zip(got.problems, got.outputs, strict=True)
    ]
    return {
        "part": "text",
        "weights": made.weights,
        **draft_columns(made, precision, shape),
        "sequences": case.sequences,
        "temperature": case.temperature,
        "split": case.split,
        "answers": len(got.outputs),
        "truncated": sum(output.finish_reason == "length" for output in got.outputs),
        "output_tokens": tokens,
        "seconds": got.seconds,
        "batch_throughput": metrics.batch_throughput(tokens, got.seconds),
        "sequence_throughput": _mean(got.speeds),
        "acceptance_length": stats.acceptance_length,
        "accepted_per_position": " ".join(f"{rate:.3f}" for rate in metrics.acceptance_rate_per_position(stats)),
        "right": sum(right),
    }


def equality(plain: list[RequestOutput], drafted: list[RequestOutput]) -> Row:
    """How many answers have plain decoding's tokens, and where the others differ first (median token)."""
    places = []
    for a, b in zip(plain, drafted, strict=True):
        if a.token_ids != b.token_ids:
            pairs = zip(a.token_ids, b.token_ids, strict=False)
            shorter = min(len(a.token_ids), len(b.token_ids))
            places.append(next((i for i, (x, y) in enumerate(pairs) if x != y), shorter))
    return {
        "equal_answers": len(plain) - len(places),
        "first_difference": median(places) if places else None,
    }


def best_rows(rows: list[Row]) -> Iterator[Row]:
    """For each number of sequences, temperature and split: the drafts that are fastest, none among them."""
    groups: dict[tuple[int, float, str], list[Row]] = {}
    for row in rows:
        if row["engine"] != "bf16":
            groups.setdefault((row["sequences"], row["temperature"], row["split"]), []).append(row)
    names = ("weights", "sequences", "temperature", "split", "drafts", "shape", "sequence_throughput", "over_bf16")
    for group in groups.values():
        best = max(group, key=lambda row: row["sequence_throughput"])
        others = ("engine", "over_plain", "break_even", "acceptance_length")
        yield {"part": "best"} | {name: best.get(name) for name in (*names, *others)}


def _mean(speeds: list[float]) -> float:
    """Of sequences that decoded; a split whose every answer is one token long has no speed."""
    return metrics.mean(speeds) or float("nan")
