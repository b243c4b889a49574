"""The recipe's workload: generations of one problem at once, stopped when the first of them are done.

Answers are as long as seeded lengths say, spread like a reasoning model's; the total time of bf16 is compared with that
of FP8 and of FP8 with drafts whose acceptance is held.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import replace

from fourfold.benchmark.gpu.models import Measured
from fourfold.benchmark.gpu.oracle import Oracle
from fourfold.benchmark.gpu.steps import draft_columns, requests
from fourfold.benchmark.metrics import pool
from fourfold.benchmark.rows import Row
from fourfold.engine import LLMEngine
from fourfold.engine.draft_plan import DraftShape
from fourfold.engine.requests import RequestOutput

GENERATIONS, KEPT, TEMPERATURE = 12, 10, 0.7
CONTEXT = 200
"""Tokens of the prompt."""


def answer_lengths(longest: int) -> list[int]:
    """Tokens of each generation: evenly distributed between half the longest and the longest, from a fixed seed."""
    generator = random.Random(0)
    return [generator.randint(longest // 2, longest) for _ in range(GENERATIONS)]


def recipe_rows(made: Measured, longest: int, drafts: int, acceptance: float) -> Iterator[Row]:
    """bf16, fp8, fp8 with drafts, and fp8-all with drafts.

    Args: tokens of the longest answer; drafts of a verification; the acceptance length that is held.
    """
    prompt = made.prompt(CONTEXT)
    lengths = answer_lengths(longest)
    base: float | None = None
    for precision, count in (("bf16", 0), ("fp8", 0), ("fp8", drafts), ("fp8-all", drafts)):
        shape = DraftShape.chain(count)
        # Of which no two end with one step and the one behind it.
        short = [2 + 2 * (count + 1) * i for i in range(GENERATIONS)]
        engine = made.engine(precision, shape, GENERATIONS, CONTEXT + max(longest, *short))
        if count:
            Oracle(engine, GENERATIONS, longest).hold(acceptance)
        # Captures the step of each number of sequences.
        engine.generate([prompt] * GENERATIONS, requests(short, TEMPERATURE))
        outputs, seconds = _run(engine, prompt, lengths)
        base = base or seconds
        tokens = sum(len(output.token_ids) for output in outputs)
        stats = pool([output.speculation for output in outputs])
        yield {
            "part": "recipe",
            "weights": made.weights,
            **draft_columns(made, precision, shape),
            "sequences": GENERATIONS,
            "context": CONTEXT,
            "temperature": TEMPERATURE,
            "held_acceptance": acceptance if count else None,
            "acceptance_length": stats.acceptance_length,
            "output_tokens": tokens,
            "seconds": seconds,
            "batch_throughput": tokens / seconds,
            # The recipe divides each request's tokens by the whole time.
            "sequence_throughput": tokens / seconds / GENERATIONS,
            "over_bf16": base / seconds,
        }


def _run(engine: LLMEngine, prompt: list[int], lengths: list[int]) -> tuple[list[RequestOutput], float]:
    """All outputs when the first `KEPT` have ended, the others cut there; and seconds until then."""
    begin = time.perf_counter()
    outputs: dict[str, RequestOutput] = {}
    for params in requests(lengths, TEMPERATURE):
        outputs[engine.add_request(prompt, params)] = RequestOutput("", prompt)
    while sum(output.finish_reason is not None for output in outputs.values()) < KEPT:
        outputs |= {output.request_id: output for output in engine.step()}
    seconds = time.perf_counter() - begin
    # What a cancellation still adds was not there when the time was taken.
    cut = [replace(output, token_ids=list(output.token_ids)) for output in outputs.values()]
    for name in outputs:
        engine.cancel(name)
    return cut, seconds
