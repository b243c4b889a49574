"""All of the benchmark in one go, within minutes: checks first, then its parts, one CSV row for what was measured."""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from fourfold.artifacts.provenance import device_name, git_commit, library_versions
from fourfold.benchmark.checker import AnswerChecker
from fourfold.benchmark.gpu.curve import curve_rows
from fourfold.benchmark.gpu.models import (
    Measured,
    Text,
    carried_models,
    free_memory,
    random_models,
    small_models,
)
from fourfold.benchmark.gpu.parity import check_parity
from fourfold.benchmark.gpu.real_text import best_rows, text_rows
from fourfold.benchmark.gpu.recipe import recipe_rows
from fourfold.benchmark.gpu.steps import step_cases, time_case, tree_shape
from fourfold.benchmark.gpu.tables import show
from fourfold.benchmark.gpu.trained import read_recipe, train_on_device
from fourfold.benchmark.rows import Row, write_csv
from fourfold.engine.draft_plan import DraftShape
from fourfold.errors import FourfoldError
from fourfold.model.carrier import QWEN2_14B
from fourfold.modeling.checkpoint import check_device, resolve_device
from fourfold.modeling.config import TransformerConfig
from fourfold.problems.read import Split
from fourfold.progress import logger

PARTS = ("drafter", "steps", "text", "oracle", "recipe")
LIBRARIES = ["torch", "triton", "transformers", "math-verify"]


@dataclass(frozen=True)
class GpuBenchmark:
    """What is measured."""

    parts: tuple[str, ...] = PARTS
    sequences: tuple[int, ...] = (1, 12, 32)
    """How many decode at once; each is measured, the middle one in every part."""
    contexts: tuple[int, ...] = (200, 2200)
    """Tokens of the prompts whose steps are timed."""
    steps: int = 30
    """Steps of each case, of which the median counts."""
    drafts: int = 3
    """Draft tokens of a chain."""
    more_drafts: int = 7
    """Draft tokens of a larger tree, for real text of the middle number of sequences."""
    draft_vocab_size: int = 32768
    """Tokens that a random drafter drafts among."""
    fp8_drafter: bool = True
    """Compute the drafter in FP8; on a CPU it is not."""
    answers: int = 24
    """About how many answers to held-out problems of each kind."""
    max_tokens: int = 256
    """Longest answer to a problem."""
    longest: int = 1600
    """Tokens of the longest answer in the recipe's workload."""
    acceptance: float = 3.0
    """Acceptance length that is held there."""

    def __post_init__(self) -> None:
        if unknown := set(self.parts) - set(PARTS):
            raise FourfoldError(f"--parts: {unknown.pop()!r} is unknown; choose from {', '.join(PARTS)}")
        numbers = (*self.sequences, *self.contexts, self.more_drafts, self.steps, self.drafts)
        if min(*numbers, self.draft_vocab_size, self.answers, self.max_tokens) < 1:
            raise FourfoldError("bench-gpu: every number of sequences, tokens, steps and drafts must be 1 or more")
        if self.longest < 32:
            raise FourfoldError(f"--longest is {self.longest}; it must be 32 or more")
        if not 1 <= self.acceptance <= self.drafts + 1:
            raise FourfoldError(
                f"--acceptance is {self.acceptance:g}, but {self.drafts} drafts give between 1 and {self.drafts + 1}"
            )

    @property
    def middle(self) -> int:
        """The middle number of sequences."""
        return sorted(self.sequences)[len(self.sequences) // 2]


def benchmark_gpu(
    settings: GpuBenchmark,
    output: Path,
    model: Path | None,
    drafter: Path | None,
    problems: Path | None,
    device: str,
    shape: TransformerConfig = QWEN2_14B,
    config: Path | None = None,
) -> None:
    """Checks the device, measures, writes one CSV row for each case and prints tables.

    The CSV is written again after each row: a run that is cut keeps what it has.

    Args:
        settings: what is measured.
        output: CSV file to write.
        model: manifest of a small bf16 checkpoint to carry; None measures random weights, and no real text.
        drafter: manifest of its drafter.
        problems: manifest of problems: calibration, benchmark and unseen; with a config, train too.
        device: auto, cpu or cuda.
        shape: the large shape.
        config: a workflow configuration by which the drafter is trained here, instead of a drafter.
    Raises FourfoldError for a model that does not fit into the shape, a device that has no FP8 or fails a check, and
    for a configuration that says nothing of a drafter.
    """
    if drafter is not None and config is not None:
        raise FourfoldError("bench-gpu: --drafter is a trained one, --config trains one; give one of the two")
    if len({path is None for path in (model, drafter or config, problems)}) > 1:
        raise FourfoldError(
            "bench-gpu: give --model, --problems and one of --drafter and --config together, or none of them"
        )
    if settings.parts == ("drafter",) and config is None:
        raise FourfoldError("--parts drafter trains one; give --model, --problems and --config")
    recipe = None if config is None else read_recipe(config)
    place = resolve_device(device)
    check_device(place, "fp8")
    check_parity(place)
    about: Row = {
        "device": device_name(str(place)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        # Where files lie is the machine's own affair.
        "command": " ".join(["fourfold", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]),
        **library_versions(LIBRARIES),
    }
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row | about)
        write_csv(output, rows)
        logger.info("%s", {key: value for key, value in row.items() if value is not None})

    with tempfile.TemporaryDirectory() as folder:
        if recipe is not None and model is not None and problems is not None:
            drafter, row = train_on_device(recipe, model, problems, Path(folder), place)
            add(row)
        for row in _rows(settings, model, drafter, problems, place, shape):
            add(row)
    show(rows)


def _rows(
    settings: GpuBenchmark,
    model: Path | None,
    drafter: Path | None,
    problems: Path | None,
    device: torch.device,
    shape: TransformerConfig,
) -> Iterator[Row]:
    fp8 = settings.fp8_drafter
    if "steps" in settings.parts or model is None:
        made = random_models(shape, settings.draft_vocab_size, fp8, device)
        yield from _steps(settings, made, settings.sequences)
        if model is None:
            yield from _held(settings, made)
        del made  # before the carrier takes its memory
        free_memory(device)
    if model is None or drafter is None or problems is None or settings.parts == ("drafter",):
        return
    text = Text.read(model, problems)
    made = carried_models(model, drafter, text, shape, fp8, device)
    # Zeros can be faster than random weights: a few steps tell whether they are.
    yield from _steps(replace(settings, contexts=settings.contexts[:1]), made, (settings.middle,))
    yield from _held(settings, made)
    yield from _text(settings, made)
    del made
    free_memory(device)
    yield from _text(settings, small_models(model, drafter, text, fp8, device), brief=True)


def _steps(settings: GpuBenchmark, made: Measured, sequences: tuple[int, ...]) -> Iterator[Row]:
    if "steps" not in settings.parts:
        return
    plain: dict[tuple[int, int, float], float] = {}
    for case in step_cases(list(sequences), list(settings.contexts), settings.drafts):
        row = time_case(made, case, settings.steps)
        place = (case.sequences, case.context, case.temperature)
        # Of one token a step; with drafts, the acceptance length times as much.
        yield row | {"over_bf16": plain.setdefault(place, row["step_ms"]) / row["step_ms"]}


def _text(settings: GpuBenchmark, made: Measured, brief: bool = False) -> Iterator[Row]:
    """All for the middle number of sequences; greedy, with few shapes of drafts and one split for the others.

    brief: that of the others for all, of the usual precisions, with one shape.
    """
    if "text" not in settings.parts:
        return
    rows = []
    with AnswerChecker() as checker:
        for sequences in settings.sequences:
            whole = sequences == settings.middle and not brief
            temperatures = [0.0, 0.7] if whole else [0.0]
            splits: tuple[Split, ...] = ("benchmark", "unseen") if whole else ("benchmark",)
            larger = DraftShape(4, 6, draft_tokens=settings.more_drafts)
            shapes = [tree_shape(sequences), DraftShape.chain(settings.drafts), *([larger] if whole else [])]
            precisions = ("bf16", "fp8") if brief else ("bf16", "fp8", "fp8-all")
            for row in text_rows(
                made,
                sequences,
                temperatures,
                splits,
                precisions,
                shapes[:1] if brief else shapes,
                settings.answers,
                settings.max_tokens,
                checker.same,
            ):
                rows.append(row)
                yield row
    yield from best_rows(rows)


def _held(settings: GpuBenchmark, made: Measured) -> Iterator[Row]:
    """The parts that hold the acceptance: steps have to be captured for it."""
    wanted = {"oracle", "recipe"} & set(settings.parts)
    if wanted and made.targets["bf16"].device.type != "cuda":
        logger.info("acceptance can be held on a GPU only: leaving out %s", " and ".join(sorted(wanted)))
        return
    if "oracle" in wanted:
        for context in settings.contexts:
            yield from curve_rows(made, settings.middle, context, settings.drafts, settings.steps)
    if "recipe" in wanted:
        yield from recipe_rows(made, settings.longest, settings.drafts, settings.acceptance)
