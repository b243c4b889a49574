"""Speed over acceptance: FP8 with a drafter, acceptance held from 1.0 to beyond 4, against bf16 in the same place."""

import time
from collections.abc import Iterator

from fourfold.benchmark import metrics
from fourfold.benchmark.gpu.models import Measured
from fourfold.benchmark.gpu.oracle import Oracle
from fourfold.benchmark.gpu.steps import WARMUP, add_requests, draft_columns, read_prompts, requests
from fourfold.benchmark.rows import Row
from fourfold.engine import LLMEngine
from fourfold.engine.draft_plan import NO_DRAFTS, DraftShape
from fourfold.engine.requests import RequestOutput, SpeculationStats


def curve_rows(made: Measured, sequences: int, context: int, drafts: int, steps: int) -> Iterator[Row]:
    """bf16 without drafts; fp8 with one draft more than asked, in steps of a half; fp8 and fp8-all with as
    many as asked, in whole steps. Greedy.

    Args: sequences at once; tokens of their prompts; draft tokens of a verification; steps of each point.
    """
    prompt = made.prompt(context)
    row: Row = {"part": "oracle", "weights": made.weights, "sequences": sequences, "context": context}
    row |= {"temperature": 0.0}
    room = WARMUP + steps + 1
    plain = _speed(
        made.engine("bf16", NO_DRAFTS, sequences, context + room, prefix_caching=True), prompt, sequences, room, steps
    )
    yield row | draft_columns(made, "bf16", NO_DRAFTS) | plain
    for precision, count, halves in (("fp8", drafts + 1, 1), ("fp8", drafts, 2), ("fp8-all", drafts, 2)):
        room = (WARMUP + steps + 1) * (count + 1)
        shape = DraftShape.chain(count)
        engine = made.engine(precision, shape, sequences, context + room, prefix_caching=True)
        oracle = Oracle(engine, sequences, room)
        for half in range(2, 2 * count + 3, halves):
            oracle.hold(half / 2)
            speed = _speed(engine, prompt, sequences, room, steps)
            ratio = speed["sequence_throughput"] / plain["sequence_throughput"]
            point = {"held_acceptance": half / 2, **speed, "over_bf16": ratio}
            yield row | draft_columns(made, precision, shape) | point


def _speed(engine: LLMEngine, prompt: list[int], sequences: int, room: int, steps: int) -> Row:
    """Milliseconds of a step, tokens/s of a sequence, and what was accepted; over all steps after the first few."""
    names = add_requests(engine, prompt, requests([room] * sequences, 0.0))
    read_prompts(engine)
    for _ in range(WARMUP):
        outputs = engine.step()
    before, drafts, kept = _counts(outputs)
    begin = time.perf_counter()
    for _ in range(steps):
        outputs = engine.step()
    seconds = time.perf_counter() - begin
    after, all_drafts, all_kept = _counts(outputs)
    for name in names:
        engine.cancel(name)
    return {
        "step_ms": seconds / steps * 1e3,
        "sequence_throughput": (after - before) / seconds / sequences,
        "batch_throughput": (after - before) / seconds,
        "acceptance_length": 1 + (all_kept - kept) / (all_drafts - drafts) if all_drafts > drafts else None,
    }


def _counts(outputs: list[RequestOutput]) -> tuple[int, int, int]:
    """Tokens, verifications and accepted drafts so far."""
    stats: SpeculationStats = metrics.pool([output.speculation for output in outputs])
    return sum(len(output.token_ids) for output in outputs), stats.num_drafts, stats.num_accepted_tokens
