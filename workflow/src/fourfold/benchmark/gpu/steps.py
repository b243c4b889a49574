"""Decoding steps, timed as a user meets them: from one call of the engine to the next, after all prompts were read.

Beside a step stands the time of the captured step alone, so that the host's share shows. What a verification costs does
not depend on how many drafts it keeps: tokens/s at an acceptance length is that length over the step.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from fourfold.benchmark.gpu.host_gap import host_gap
from fourfold.benchmark.gpu.models import Measured
from fourfold.benchmark.rows import Row
from fourfold.engine import LLMEngine, SamplingParams

WARMUP = 3
PROFILED = 10
"""Steps that are run under the profiler."""


@dataclass(frozen=True)
class StepCase:
    """What is timed."""

    precision: str
    sequences: int
    context: int
    """Tokens of each prompt."""
    temperature: float
    drafts: int
    """Draft tokens of each verification; 0 decodes plainly."""


def step_cases(sequences: list[int], contexts: list[int], drafts: int) -> Iterator[StepCase]:
    """Greedy for all; sampled, where the choice of tokens costs more, and with all in FP8 for the middle number of
    sequences."""
    middle = sorted(sequences)[len(sequences) // 2]
    for precision, count in (("bf16", 0), ("fp8", 0), ("fp8", drafts), ("fp8-all", 0), ("fp8-all", drafts)):
        for number in [middle] if precision == "fp8-all" else sequences:
            for context in contexts:
                yield StepCase(precision, number, context, 0.0, count)
        yield StepCase(precision, middle, min(contexts), 0.7, count)


def time_case(made: Measured, case: StepCase, steps: int) -> Row:
    """One row: median milliseconds of a step, of the captured step alone, and the host's gap between steps."""
    room = (WARMUP + steps + PROFILED + 1) * (case.drafts + 1)
    engine = made.engine(case.precision, case.drafts, case.sequences, case.context + room)
    for i, prompt in enumerate(made.prompts(case.sequences, case.context)):
        params = SamplingParams(max_tokens=room, temperature=case.temperature, seed=i, ignore_eos=True)
        engine.add_request(prompt, params)
    times = time_steps(engine, steps)
    graphs = engine.decoder.graphs
    return {
        "part": "steps",
        "weights": made.weights,
        "engine": engine_name(case.precision, case.drafts),
        "sequences": case.sequences,
        "context": case.context,
        "temperature": case.temperature,
        "drafts": case.drafts,
        "fp8_drafter": made.fp8_drafter if case.drafts else None,
        "step_ms": median(times) * 1e3,
        "captured_ms": None if graphs is None else graphs.replay_ms(steps),
        **host_gap(engine, PROFILED),
    }


def engine_name(precision: str, drafts: int) -> str:
    """What an engine is called in rows and tables."""
    return f"{precision}-redrafter" if drafts else precision


def read_prompts(engine: LLMEngine) -> None:
    """Steps until no request waits."""
    while engine.num_waiting:
        engine.step()


def time_steps(engine: LLMEngine, steps: int) -> list[float]:
    """Seconds of each of some steps, after the prompts were read and a few steps were captured.

    A step returns when the GPU has given its tokens; the next one may run by then, so the GPU must not be waited for.
    """
    read_prompts(engine)
    for _ in range(WARMUP):
        engine.step()
    begin = time.perf_counter()
    times: list[float] = []
    for _ in range(steps):
        engine.step()
        times.append(time.perf_counter() - begin)
        begin += times[-1]
    return times
