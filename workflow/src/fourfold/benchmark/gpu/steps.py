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
from fourfold.engine.draft_plan import NO_DRAFTS, DraftShape

MAX_ROWS = 64
"""Of `modeling.split_product`, which needs Triton."""

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
    shape: DraftShape
    """What is drafted; NO_DRAFTS decodes plainly."""


def tree_shape(sequences: int) -> DraftShape:
    """A tree of as many drafts as make no product slower than its weights can be read, a dozen at most.

    With one draft a sequence there are candidates for two: sequences share what is verified.
    """
    drafts = max(1, min(11, MAX_ROWS // sequences - 1))
    return DraftShape(min(4, max(2, drafts)), min(5, max(2, drafts)) + 1, draft_tokens=drafts)


def step_cases(sequences: list[int], contexts: list[int], drafts: int) -> Iterator[StepCase]:
    """Greedy for all; sampled, where the choice of tokens costs more, and with all in FP8 for the middle number of
    sequences. Plain, with a chain of drafts and with a tree."""
    middle = sorted(sequences)[len(sequences) // 2]
    for precision in ("bf16", "fp8", "fp8-all"):
        numbers = [middle] if precision == "fp8-all" else sequences
        for kind in ("plain",) if precision == "bf16" else ("plain", "chain", "tree"):
            shapes = {
                number: {"plain": NO_DRAFTS, "chain": DraftShape.chain(drafts), "tree": tree_shape(number)}[kind]
                for number in numbers
            }
            for number in numbers:
                for context in contexts:
                    yield StepCase(precision, number, context, 0.0, shapes[number])
            yield StepCase(precision, middle, min(contexts), 0.7, shapes[middle])


def time_case(made: Measured, case: StepCase, steps: int) -> Row:
    """One row: median milliseconds of a step, of the captured step alone, and the host's gap between steps."""
    room = (WARMUP + steps + PROFILED + 1) * case.shape.beam_length
    engine = made.engine(case.precision, case.shape, case.sequences, case.context + room, prefix_caching=True)
    add_requests(engine, made.prompt(case.context), requests([room] * case.sequences, case.temperature))
    times = time_steps(engine, steps)
    graphs = engine.decoder.graphs
    return {
        "part": "steps",
        "weights": made.weights,
        **draft_columns(made, case.precision, case.shape),
        "sequences": case.sequences,
        "context": case.context,
        "temperature": case.temperature,
        "step_ms": median(times) * 1e3,
        "captured_ms": None if graphs is None else graphs.replay_ms(steps),
        **host_gap(engine, PROFILED),
    }


def draft_columns(made: Measured, precision: str, shape: DraftShape) -> Row:
    """What an engine is called in rows and tables, and what it drafts."""
    drafts = shape.nodes - 1
    return {
        "engine": f"{precision}-redrafter" if drafts else precision,
        "drafts": drafts,
        "shape": str(shape) if drafts else None,
        "fp8_drafter": made.fp8_drafter if drafts else None,
    }


def requests(lengths: list[int], temperature: float) -> list[SamplingParams]:
    """Requests of fixed lengths; the seed is the row."""
    return [
        SamplingParams(max_tokens=length, temperature=temperature, seed=i, ignore_eos=True)
        for i, length in enumerate(lengths)
    ]


def add_requests(engine: LLMEngine, prompt: list[int], params: list[SamplingParams]) -> list[str]:
    """Requests for one prompt, which an engine with `prefix_caching` reads once; returns their names.

    A request that ends with the prompt leaves it in the cache, and each other one takes a copy: to read a long prompt
    for each takes seconds, and says nothing about steps.
    """
    engine.generate([prompt], requests([1], 0.0))
    return [engine.add_request(prompt, param) for param in params]


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
