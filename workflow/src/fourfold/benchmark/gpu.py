"""Decoding steps of a large shape, timed on one GPU: bf16, FP8, and FP8 with a drafter.

The weights are random, or a small model's inside the large shape (`model.carrier`); the prompts are random tokens of a
given length. A step is timed as a user meets it, from one call of the engine to the next, after all prompts were read;
beside it stands the time of the captured step alone, so that the host's share shows. What a verification costs does not
depend on how many drafts it keeps: tokens/s at an acceptance length is that length over the step.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fourfold.artifacts import read_manifest
from fourfold.artifacts.provenance import device_name, git_commit, library_versions
from fourfold.benchmark.rows import write_csv
from fourfold.benchmark.tables import Row
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.errors import FourfoldError
from fourfold.model.carrier import QWEN2_14B, carry, carry_drafter, random_drafter, random_weights
from fourfold.modeling.checkpoint import (
    Weights,
    build_transformer,
    check_device,
    compute_dtype,
    read_weights,
    resolve_device,
)
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.redrafter import Redrafter, load_redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.progress import logger
from fourfold.quantize.on_device import input_ranges, to_fp8

WARMUP = 3
CALIBRATION_TOKENS = (4, 512)


@dataclass(frozen=True)
class StepCase:
    """What is timed."""

    sequences: int
    context: int
    """Tokens of each prompt."""
    temperature: float
    drafts: int
    """Draft tokens of each verification; 0 decodes plainly."""


@dataclass(frozen=True)
class Measured:
    """Models to time: the target in bf16 and FP8, and a drafter."""

    weights: str
    """random or carrier."""
    targets: dict[str, Transformer]
    drafter: Redrafter
    fp8_drafter: bool


def benchmark_gpu(
    output: Path,
    model: Path | None,
    drafter: Path | None,
    sequences: list[int],
    contexts: list[int],
    steps: int,
    drafts: int,
    draft_vocab_size: int,
    fp8_drafter: bool,
    device: str,
    shape: TransformerConfig = QWEN2_14B,
) -> None:
    """Times all cases, prints a table and writes one CSV row a case.

    Args:
        output: CSV file to write.
        model: manifest of a small bf16 checkpoint to carry; None takes random weights.
        drafter: manifest of its drafter; None takes a random one.
        sequences: how many decode at once; each is measured.
        contexts: lengths of the prompts; each is measured.
        steps: steps of each case, of which the median counts.
        drafts: draft tokens of a verification.
        draft_vocab_size: tokens that a random drafter drafts among.
        fp8_drafter: compute the drafter in FP8; on a CPU it is not.
        device: auto, cpu or cuda.
        shape: the large shape.
    Raises FourfoldError for a model that does not fit into the shape, or a device that has no FP8.
    """
    if min(*sequences, *contexts, steps, drafts, draft_vocab_size) < 1:
        raise FourfoldError("--sequences, --contexts, --steps, --drafts and --draft-vocab-size must be 1 or more")
    place = resolve_device(device)
    check_device(place, "fp8")
    rows: list[Row] = []
    about = _provenance(place)
    made = _models(model, drafter, draft_vocab_size, fp8_drafter, place, shape)
    for engine, case in _cases(sequences, contexts, drafts):
        row = time_case(made, engine, case, steps) | about
        rows.append(row)
        logger.info("%s", {key: row[key] for key in ("engine", "sequences", "context", "temperature", "step_ms")})
    write_csv(output, rows)
    show(rows)


def _cases(sequences: list[int], contexts: list[int], drafts: int) -> Iterator[tuple[str, StepCase]]:
    """Greedy for all; sampled, where the choice of tokens costs more, for the middle number of sequences."""
    middle = sorted(sequences)[len(sequences) // 2]
    for engine, count in (("bf16", 0), ("fp8", 0), ("fp8", drafts)):
        for number in sequences:
            for context in contexts:
                yield engine, StepCase(number, context, 0.0, count)
        yield engine, StepCase(middle, min(contexts), 0.7, count)


def _models(
    model: Path | None,
    drafter: Path | None,
    draft_vocab_size: int,
    fp8_drafter: bool,
    device: torch.device,
    shape: TransformerConfig,
) -> Measured:
    if model is None:
        config, weights = shape, random_weights(shape, device)
    else:
        read_manifest(model)
        config, weights = carry(*read_weights(model.parent), shape, device)
    if drafter is None:
        with torch.device(device):
            network = Redrafter(
                random_drafter(config, draft_vocab_size), torch.randperm(config.vocab_size)[:draft_vocab_size]
            )
    else:
        read_manifest(drafter)
        network = carry_drafter(load_redrafter(drafter.parent, torch.bfloat16), config)
    targets = make_targets(config, weights, device)
    dtype = targets["bf16"].dtype
    name = "random" if model is None else "carrier"
    network = network.to(device, dtype).requires_grad_(False)
    return Measured(name, targets, network, fp8_drafter and device.type == "cuda")


def make_targets(config: TransformerConfig, weights: Weights, device: torch.device) -> dict[str, Transformer]:
    """The model in bf16, and in FP8 with the ranges that random tokens give. Both share what is not quantised."""
    dtype = compute_dtype(device)
    plain = build_transformer(config, dict(weights), device, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, CALIBRATION_TOKENS, generator=generator).to(device)
    ranges = input_ranges(plain, tokens[:, : config.max_position_embeddings])
    return {"bf16": plain, "fp8": build_transformer(config, to_fp8(weights, ranges), device, dtype)}


def time_case(made: Measured, precision: str, case: StepCase, steps: int) -> Row:
    """One row: median milliseconds of a step, of the captured step alone, and what they give."""
    target = made.targets[precision]
    room = (WARMUP + steps + 1) * (case.drafts + 1)
    engine = LLMEngine(
        target,
        _tokenizer(),
        end_token_ids=(),
        drafter=made.drafter if case.drafts else None,
        fp8_drafter=made.fp8_drafter,
        plan=DraftPlan.fixed(1, case.drafts + 1) if case.drafts else None,
        max_num_seqs=case.sequences,
        max_model_len=case.context + room,
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, target.config.vocab_size, (case.sequences, case.context), generator=generator)
    for i, prompt in enumerate(tokens.tolist()):
        params = SamplingParams(max_tokens=room, temperature=case.temperature, seed=i, ignore_eos=True)
        engine.add_request(prompt, params)
    while engine.num_waiting:
        engine.step()
    for _ in range(WARMUP):
        engine.step()
    begin = _now(target)
    times: list[float] = []
    for _ in range(steps):
        engine.step()
        times.append(_now(target) - begin)
        begin += times[-1]
    row: Row = {
        "weights": made.weights,
        "engine": f"{precision}-redrafter" if case.drafts else precision,
        "sequences": case.sequences,
        "context": case.context,
        "temperature": case.temperature,
        "drafts": case.drafts,
        "fp8_drafter": made.fp8_drafter if case.drafts else None,
        "step_ms": median(times) * 1e3,
        "captured_ms": _captured_ms(engine, steps),
    }
    del engine
    gc.collect()
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _captured_ms(engine: LLMEngine, steps: int) -> float | None:
    """Milliseconds of the captured step alone, replayed without the host; None where none was captured."""
    graphs = engine._graphs
    return None if graphs is None else graphs.replay_ms(steps)


def _now(target: Transformer) -> float:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Random weights have no text; an engine wants a tokenizer all the same."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>")))


def _provenance(device: torch.device) -> Row:
    return {
        "device": device_name(str(device)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        **library_versions(["torch"]),
    }


def show(rows: list[Row], acceptances: tuple[float, ...] = (2.0, 3.0, 4.0)) -> None:
    """Prints the steps, and tokens/s per sequence; of drafting engines at given acceptance lengths, and over bf16."""
    table = Table(title=f"Decoding steps, {rows[0]['weights']} weights, {rows[0]['device']}, {rows[0]['date']}")
    headings = ["Engine", "At once", "Context", "Temp.", "Step, ms", "Captured, ms", "Tok/s per sequence", "Over bf16"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "Engine" else "right")
    plain = {_place(row): row["step_ms"] for row in rows if row["engine"] == "bf16"}
    for row in rows:
        lengths = acceptances if row["drafts"] else (1.0,)
        reached = [length for length in lengths if length <= row["drafts"] + 1]
        speeds = [length / row["step_ms"] * 1e3 for length in reached]
        ratios = [f"{length * plain[_place(row)] / row['step_ms']:.2f}x" for length in reached]
        if row["drafts"]:
            ratios = [f"{ratio} at {length:g}" for ratio, length in zip(ratios, reached, strict=True)]
        captured = "–" if row["captured_ms"] is None else f"{row['captured_ms']:.2f}"
        cells = [row["engine"], row["sequences"], row["context"], row["temperature"], f"{row['step_ms']:.2f}", captured]
        cells += [" / ".join(f"{speed:.0f}" for speed in speeds), ", ".join(ratios)]
        table.add_row(*map(str, cells))
    Console(width=140).print(table)


def _place(row: Row) -> tuple[int, int, float]:
    return row["sequences"], row["context"], row["temperature"]
