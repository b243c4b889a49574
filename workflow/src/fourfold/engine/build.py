"""The engine artifact: one directory with everything that serving needs, tokenizer included.

`engine.json` holds the settings, the model's shape and the tokens that end an answer; `model.safetensors` the fused
weights in the precision's dtype; `drafter/` the drafter's checkpoint; the tokenizer's files lie beside them.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json
from fourfold.artifacts.provenance import device_name
from fourfold.artifacts.tensors import bytes_by_dtype, first_not_finite
from fourfold.config.engine import EngineSettings
from fourfold.engine.draft_plan import DraftPlan
from fourfold.engine.llm_engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer
from fourfold.modeling.checkpoint import (
    build_transformer,
    check_precision,
    compute_dtype,
    read_weights,
    resolve_device,
)
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.redrafter import DRAFT_VOCAB, WEIGHTS, load_redrafter
from fourfold.progress import logger

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
)
DRAFTER_FILES = ("config.json", WEIGHTS, DRAFT_VOCAB)


def build_engine(settings: EngineSettings, target: Path, drafter: Path | None, output: Path) -> None:
    """Writes an engine directory.

    Args:
        settings: the engine's row.
        target: manifest of the checkpoint in the row's precision.
        drafter: manifest of the drafter; needed when the row has one.
        output: manifest of the engine.
    Raises FourfoldError when the checkpoint is not in that precision, in dtypes and bytes, or the drafter does not fit.
    """
    if settings.backend != "torch":
        raise FourfoldError(f"backend {settings.backend} cannot be built yet: use backend torch")
    read_manifest(target, "fetch_model", "quantize_model")
    source = target.parent
    config, weights = read_weights(source)
    check_precision(weights, config, settings.precision)
    _check_finite(weights, source)
    if settings.max_model_len > config.max_position_embeddings:
        raise FourfoldError(
            f"max_model_len is {settings.max_model_len}, more than the {config.max_position_embeddings} positions that "
            "the model was made for; lower it"
        )
    inputs = {"target": target}
    if settings.drafter == "redrafter":
        if drafter is None:
            raise FourfoldError("the engine's row names a drafter: give its manifest with --drafter")
        inputs["drafter"] = drafter
        _check_drafter(drafter, config, settings)
    ends = end_token_ids(source, load_tokenizer(source))
    with write_artifact(
        output,
        stage="build_engine",
        settings=settings.model_dump(mode="json"),
        inputs=inputs,
        libraries=["torch", "safetensors", "transformers"],
    ) as staging:
        save_file(weights, staging.path / "model.safetensors", metadata={"format": "pt"})
        _copy(source, staging.path, TOKENIZER_FILES)
        if "drafter" in inputs:
            (staging.path / "drafter").mkdir()
            _copy(inputs["drafter"].parent, staging.path / "drafter", DRAFTER_FILES)
        engine = {
            "settings": settings.model_dump(mode="json"),
            "model": config.to_dict(),
            "end_token_ids": list(ends),
            "weight_bytes": bytes_by_dtype([staging.path / "model.safetensors"]),
        }
        (staging.path / "engine.json").write_text(dump_json(engine), encoding="utf-8")


def _check_drafter(manifest: Path, config: TransformerConfig, settings: EngineSettings) -> None:
    """Raises FourfoldError when a drafter was made for another model or for fewer drafts, or is broken."""
    directory = manifest.parent
    trained = read_manifest(manifest, "train_drafter")["predict_tokens"]
    drafter = load_redrafter(directory)
    shape = drafter.config
    for name in ("hidden_size", "vocab_size"):
        if getattr(shape, name) != getattr(config, name):
            raise FourfoldError(
                f"{directory}: the drafter's {name} is {getattr(shape, name)}, the model's {getattr(config, name)}; "
                "train a drafter for this model"
            )
    if settings.beam_width > shape.num_logits:
        raise FourfoldError(
            f"beam_width is {settings.beam_width}, but {directory} drafts among {shape.num_logits} tokens; lower it"
        )
    if settings.beam_length - 1 > trained:
        raise FourfoldError(
            f"beam_length is {settings.beam_length}, but {directory} was trained for {trained} drafts, hence at most "
            f"{trained + 1}; lower it or raise drafter.training.predict_tokens"
        )
    _check_finite(drafter.state_dict(), directory)


def _check_finite(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Raises FourfoldError naming a tensor that holds a NaN or an infinity."""
    if (broken := first_not_finite(tensors.items())) is not None:
        raise FourfoldError(f"{directory}: tensor {broken} holds a NaN or an infinity; make the checkpoint again")


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)


def load_engine(directory: Path, device: str = "auto") -> LLMEngine:
    """Loads an engine directory. Raises FourfoldError when it is incomplete or does not fit the device.

    The engine's `info` holds precision, drafter, backend, weight_bytes (by dtype), compute_dtype, device,
    device_type, fp8_emulated, kv_cache_bytes and load_time (seconds).
    """
    begin = time.perf_counter()
    read_manifest(directory / "manifest.json")
    engine: dict[str, Any] = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
    settings = EngineSettings.model_validate(engine["settings"])
    place = resolve_device(device)
    _check_device(place, settings)
    dtype = compute_dtype(place)
    config = TransformerConfig(**engine["model"])
    weights = load_file(directory / "model.safetensors")
    check_precision(weights, config, settings.precision)
    target = build_transformer(config, weights, place, dtype)
    drafter = load_redrafter(directory / "drafter", dtype, place) if settings.drafter == "redrafter" else None
    result = LLMEngine(
        target,
        load_tokenizer(directory),
        end_token_ids=tuple(engine["end_token_ids"]),
        drafter=drafter,
        plan=DraftPlan.fixed(settings.beam_width, settings.beam_length),
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
    )
    result.info = {
        "precision": settings.precision,
        "drafter": settings.drafter,
        "backend": settings.backend,
        "weight_bytes": engine["weight_bytes"],
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": device_name(str(place)),
        "device_type": place.type,
        "fp8_emulated": settings.precision == "fp8" and place.type == "cpu",
        "kv_cache_bytes": result.kv_cache_bytes,
        "load_time": time.perf_counter() - begin,
    }
    logger.info(
        "engine %s: %s weights of %.0f MB on %s, computing in %s, loaded in %.1f s",
        directory.name,
        settings.precision,
        sum(engine["weight_bytes"].values()) / 1e6,
        result.info["device"],
        result.info["compute_dtype"],
        result.info["load_time"],
    )
    return result


def _check_device(device: torch.device, settings: EngineSettings) -> None:
    if settings.precision == "fp8" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise FourfoldError(
                f"precision fp8 needs a GPU of compute capability 8.9 or higher, {torch.cuda.get_device_name(device)} "
                f"has {major}.{minor}; use precision int8_wo or bf16"
            )
