"""A drafter that is made within the benchmark, on the device, by a workflow configuration.

The workflow's own stages make its data and train it. Its target's FP8 checkpoint is not made by NVIDIA ModelOpt, which
the machine need not have, but as the benchmark's other models are (`quantize.on_device`).
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.provenance import device_name
from fourfold.benchmark.gpu.models import free_memory
from fourfold.benchmark.rows import Row
from fourfold.config.load import parse_config, read_values
from fourfold.config.root import Config
from fourfold.config.stages import DrafterDataStage, DrafterTrainStage
from fourfold.drafter.data import generate_drafter_data
from fourfold.drafter.train import train_drafter
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import TOKENIZER_FILES, encode_rendered, load_tokenizer, render_conversation
from fourfold.modeling.checkpoint import build_transformer, compute_dtype, read_weights
from fourfold.problems.read import read_problems
from fourfold.progress import logger
from fourfold.quantize.on_device import input_ranges, save_weights, to_fp8


def read_recipe(path: Path) -> Config:
    """Reads a configuration that says how to train a drafter.

    Raises FourfoldError when it has no section `drafter`, one for int8 weights, or is wrong elsewhere.
    """
    values = read_values(path)
    if "drafter" not in values:
        raise FourfoldError(f"--config {path}: there is no section drafter, which says how to train one; add it")
    config = parse_config(values)
    if config.drafter.target == "int8_wo":
        raise FourfoldError(f"--config {path}: drafter.target is int8_wo; bench-gpu measures fp8 and bf16 alone")
    return config


def train_on_device(
    config: Config, model: Path, problems: Path, folder: Path, device: torch.device
) -> tuple[Path, Row]:
    """Makes a drafter for a model.

    Args:
        config: its `drafter`, `prompt`, `calibration` and `quantize` are used.
        model: manifest of a bf16 checkpoint.
        problems: manifest of the problems: train and calibration.
        folder: where all that is made goes.
        device: where it is made.
    Returns the drafter's manifest, and a row of part `drafter`. Raises FourfoldError as the stages do.
    """
    read_manifest(model)
    settings = config.drafter
    if settings.target == "fp8" and len(read_problems(problems, "calibration")) < config.calibration.samples:
        raise FourfoldError(
            f"calibration.samples is {config.calibration.samples}, but {problems.parent} holds fewer calibration "
            "problems; raise problems.splits.calibration"
        )
    target, data, drafter = (folder / name / "manifest.json" for name in ("target", "data", "drafter"))
    if settings.target == "fp8":
        _quantize(config, model, problems, target, device)
    else:
        target = model
    begin = time.perf_counter()
    made = DrafterDataStage(data=settings.data, prompt=config.prompt)
    generate_drafter_data(made, target, problems, folder / "work", data, str(device))
    free_memory(device)
    generated = time.perf_counter()
    stage = DrafterTrainStage(shape=settings.shape, training=settings.training)
    step_ms = train_drafter(stage, target, data, folder / "work", drafter, str(device))
    free_memory(device)
    trained = time.perf_counter()
    texts, result = read_manifest(data), read_manifest(drafter)
    return drafter, {
        "part": "drafter",
        "weights": "small",
        "engine": settings.target,
        "temperature": settings.data.temperature if settings.data.source == "generations" else None,
        "data_seconds": generated - begin,
        "texts": texts["texts"],
        "text_tokens": texts["answer_tokens"],
        "training_seconds": trained - generated,
        "training_steps": result["steps"],
        "training_step_ms": step_ms,
        "best_epoch": result["best_epoch"],
        "heldout_texts": result["heldout_texts"],
        "heldout_simulated_acceptance_length": result["heldout_simulated_acceptance_length"],
    }


def _quantize(config: Config, model: Path, problems: Path, output: Path, device: torch.device) -> None:
    """Writes the FP8 checkpoint of a bf16 one, with its tokenizer."""
    source = model.parent
    with write_artifact(
        output,
        stage="quantize_on_device",
        settings={"calibration": config.calibration.model_dump(), "max_length": config.quantize.max_length},
        inputs={"model": model, "problems": problems},
        libraries=["torch", "safetensors"],
        device=device_name(str(device)),
    ) as staging:
        shape, weights = read_weights(source)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        plain = build_transformer(shape, dict(weights), device, compute_dtype(device))
        ranges = input_ranges(plain, _calibration(config, source, problems, device))
        save_weights(to_fp8(weights, ranges), shape, staging.path)
        for pattern in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
            for file in source.glob(pattern):
                shutil.copyfile(file, staging.path / file.name)
    free_memory(device)
    logger.info("FP8 target: %d products quantised on the device", len(ranges))


def _calibration(config: Config, model: Path, problems: Path, device: torch.device) -> Iterator[Tensor]:
    """Token ids of each calibration text, int64 [1, tokens]."""
    tokenizer = load_tokenizer(model)
    for problem in read_problems(problems, "calibration")[: config.calibration.samples]:
        text = render_conversation(tokenizer, config.prompt, problem.problem, problem.solution)
        yield torch.tensor([encode_rendered(tokenizer, text)[: config.quantize.max_length]], device=device)
