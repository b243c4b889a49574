"""The search: which shapes are worth timing, and which is the fastest for each number of sequences."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from fourfold.config.engine import EngineSettings
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.tuning.simulate import Yield

WIDTHS = (1, 2, 3, 4)
"""On a CPU."""
MIN_P = (0.0, 0.1, 0.2)
"""On a CPU."""
CANDIDATES = 4
"""On a GPU: tokens of each place among which the likeliest drafts are; more hardly ever are among them."""
DRAFT_TOKENS = (1, 2, 3, 4, 5, 6, 7, 9, 11, 15)
"""On a GPU: drafts of a tree, a sequence on the average."""
MARGIN = 1.02
"""A larger shape must be this much faster than a smaller one: timings of a few steps are not surer."""


@dataclass(frozen=True)
class Measurement:
    """A shape with a number of running sequences."""

    running: int
    shape: DraftShape
    yields: Yield
    seconds: float
    """Time of a step."""

    @property
    def throughput(self) -> float:
        """Tokens a second, all sequences together."""
        return self.running * self.yields.tokens / self.seconds

    def to_row(self) -> dict[str, Any]:
        """A row of search.csv."""
        return {
            "running": self.running,
            **asdict(self.shape),
            "acceptance_length": self.yields.tokens,
            "drafts": self.yields.drafts,
            "step_ms": self.seconds * 1e3,
            "output_throughput": self.throughput,
        }


def candidates(engine: EngineSettings, most_drafts: int, on_cpu: bool) -> list[DraftShape]:
    """Shapes to consider, smaller ones first; what the engine's row fixes stays fixed.

    Args:
        engine: the row.
        most_drafts: draft positions that the drafter was trained for.
        on_cpu: there several beams are searched for, and leaving out unlikely drafts may pay. On a GPU the likeliest
            drafts make a tree.
    """
    widths = (engine.beam_width,) if engine.beam_width != "auto" else WIDTHS if on_cpu else (1, CANDIDATES)
    lengths = range(2, most_drafts + 2) if engine.beam_length == "auto" else (engine.beam_length,)
    min_p = (engine.draft_min_p,) if engine.draft_min_p != "auto" else MIN_P if on_cpu else (0.0,)
    shapes = [DraftShape(*shape) for shape in product(widths, lengths, min_p)]
    if engine.draft_tokens != "auto":
        return [NO_DRAFTS, *(replace(shape, draft_tokens=engine.draft_tokens) for shape in shapes)]
    if on_cpu:
        return [NO_DRAFTS, *shapes]
    # No fewer than lie on the trunk: a shorter one would do. But of one each some sequence may have two.
    trees = [
        replace(shape, draft_tokens=number)
        for shape in shapes
        for number in DRAFT_TOKENS
        if shape.beam_width > 1 and shape.beam_length - 1 <= max(2, number) and number < shape.nodes - 1
    ]
    return [NO_DRAFTS, *(shape for shape in shapes if shape.beam_width == 1), *trees]


def worth_timing(yields: dict[DraftShape, Yield]) -> list[DraftShape]:
    """Shapes that no other one beats in tokens without verifying more, in their order."""

    def beaten(shape: DraftShape) -> bool:
        own = yields[shape]
        return any(
            other.tokens >= own.tokens and other.drafts <= own.drafts and other != own for other in yields.values()
        )

    return [shape for shape in yields if not beaten(shape)]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences to measure with: powers of two, and the most that run."""
    sizes = [1]
    while sizes[-1] * 2 < max_num_seqs:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == max_num_seqs else [*sizes, max_num_seqs]


def best_plan(measurements: Iterable[Measurement]) -> DraftPlan:
    """The fastest shape for each number of sequences; of nearly equal ones, the first measured."""
    best: dict[int, Measurement] = {}
    for measured in measurements:
        if measured.running not in best or measured.throughput > best[measured.running].throughput * MARGIN:
            best[measured.running] = measured
    return DraftPlan({running: measured.shape for running, measured in best.items()})
