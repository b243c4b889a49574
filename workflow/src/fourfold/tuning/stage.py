"""Stage tune_engine: the draft plan of an engine whose row leaves it open (`auto`).

A plan changes speed and memory, never a token. `search.csv` has a row for each measurement, `plan.json` what was
chosen for each number of running sequences.
"""

import sys
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json, write_text
from fourfold.artifacts.provenance import device_name
from fourfold.config.engine import EngineSettings
from fourfold.drafter.rows import to_csv
from fourfold.drafter.samples import Text, read_texts, split_held_out
from fourfold.engine.build import row_options
from fourfold.engine.draft_plan import DraftPlan, DraftShape
from fourfold.engine.llm_engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import Redrafter, check_target, load_redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.progress import logger, progress
from fourfold.tuning.search import Measurement, batch_sizes, best_plan, candidates, worth_timing
from fourfold.tuning.simulate import read_answers, simulate
from fourfold.tuning.steps import StepTimer

PLAN_FILE = "plan.json"
SEARCH_FILE = "search.csv"
TEXTS = 8
"""Held-out answers that are replayed."""


def tune_engine(settings: EngineSettings, target: Path, drafter: Path, data: Path, output: Path, device: str) -> None:
    """Searches for the fastest draft plan.

    Args:
        settings: the engine's row.
        target: manifest of the checkpoint in the row's precision.
        drafter: manifest of the drafter.
        data: manifest of the drafter's training texts; those that it was not trained on are replayed.
        output: manifest of the artifact to write.
        device: auto, cpu or cuda.
    Raises FourfoldError when no held-out text fits max_model_len.
    """
    begin = time.perf_counter()
    temperature = read_manifest(data, "generate_drafter_data")["settings"]["data"]["temperature"]
    trained = read_manifest(drafter, "train_drafter")["predict_tokens"]
    texts = fitting_texts(data, settings.max_model_len)
    transformer = load_transformer(target.parent, device, fp8_lm_head=settings.fp8_lm_head)
    network = load_redrafter(drafter.parent, transformer.dtype, transformer.device)
    check_target(network.config, transformer.config, drafter.parent)
    tokenizer = load_tokenizer(target.parent)
    shapes = candidates(settings, trained, transformer.device.type == "cpu")
    shapes = [shape for shape in shapes if shape.beam_width <= network.config.num_logits]
    engine, shapes = engine_for(settings, shapes, transformer, network, tokenizer)
    with write_artifact(
        output,
        stage="tune_engine",
        settings=settings.model_dump(mode="json"),
        inputs={"target": target, "drafter": drafter, "data": data},
        libraries=["torch", "transformers"],
        device=device_name(str(transformer.device)),
    ) as staging:
        measurements = measure(engine, shapes, texts, temperature)
        plan = best_plan(measurements)
        write_text(staging.path / SEARCH_FILE, to_csv([measured.to_row() for measured in measurements]))
        write_text(staging.path / PLAN_FILE, dump_json(plan.to_json()))
        staging.facts = {"plan": plan.to_json(), "seconds": round(time.perf_counter() - begin, 1)}
    logger.info("draft plan: %s", plan)


def engine_for(
    settings: EngineSettings,
    shapes: list[DraftShape],
    target: Transformer,
    drafter: Redrafter,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[LLMEngine, list[DraftShape]]:
    """An engine that can draft by every shape, and the shapes: those whose beams have room in the KV cache.

    Raises FourfoldError when not even single beams have.
    """
    options = row_options(settings, target)
    widths = sorted({shape.beam_width for shape in shapes}, reverse=True)
    for width in widths:
        tried = [shape for shape in shapes if shape.beam_width <= width]
        longest = max(shape.beam_length for shape in tried)
        most = max(shape.nodes for shape in tried) - 1
        try:
            engine = LLMEngine(
                target,
                tokenizer,
                end_token_ids=(),  # no request ends before its time
                drafter=drafter,
                plan=DraftPlan.fixed(width, longest, draft_tokens=most),
                **options,
            )
        except FourfoldError as error:
            if width == widths[-1]:
                raise
            logger.info("beam_width %d is not tried: %s", width, error)
        else:
            return engine, tried
    raise FourfoldError(
        "no shape of drafts is left to be tried; raise drafter.training.predict_tokens or lower beam_width"
    )


def fitting_texts(data: Path, max_model_len: int) -> list[Text]:
    """Held-out texts whose prompts leave room for an answer. Raises FourfoldError when there is none."""
    _, held_out = split_held_out(read_texts(data, max_length=sys.maxsize))
    texts = [text for text in held_out if len(text.prompt_token_ids) <= max_model_len // 2][:TEXTS]
    if not texts:
        raise FourfoldError(
            f"{data}: no held-out prompt is shorter than half of max_model_len {max_model_len}; raise it, or give "
            "beam_width and beam_length in place of auto"
        )
    return texts


def measure(engine: LLMEngine, shapes: list[DraftShape], texts: list[Text], temperature: float) -> list[Measurement]:
    """Replays the texts with every shape, and times steps with those that may be the best."""
    assert engine.drafter is not None
    answers = read_answers(engine.target, texts, temperature)
    with progress("replay", len(shapes), "shapes") as task:
        alone, together = {}, {}
        for shape in shapes:
            alone[shape] = together[shape] = simulate(engine.drafter, engine.target, answers, shape)
            if shape.shares and engine.target.device.type == "cuda":
                together[shape] = simulate(engine.drafter, engine.target, answers, shape, together=True)
            task.advance(1)
    timer = StepTimer(engine, texts, temperature)
    measurements = []
    sizes = batch_sizes(engine.max_num_seqs)
    with progress("time", len(sizes), "batch sizes") as task:
        for running in sizes:
            yields = alone if running == 1 else together
            timed = worth_timing(yields)
            seconds = timer.seconds(running, timed)
            measurements += [Measurement(running, shape, yields[shape], seconds[shape]) for shape in timed]
            task.advance(1, f"{len(timed)} shapes")
            timer.clear()
    return measurements
