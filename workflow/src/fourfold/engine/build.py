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

from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json
from fourfold.artifacts.provenance import device_name
from fourfold.artifacts.tensors import bytes_by_dtype, first_not_finite
from fourfold.config.engine import EngineSettings
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan
from fourfold.engine.llm_engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import TOKENIZER_FILES, end_token_ids, load_tokenizer
from fourfold.modeling.checkpoint import (
    build_transformer,
    cache_dtype,
    check_device,
    check_precision,
    compute_dtype,
    read_weights,
    resolve_device,
)
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.redrafter import DRAFT_VOCAB, WEIGHTS, check_target, load_redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.progress import logger

DRAFTER_FILES = ("config.json", WEIGHTS, DRAFT_VOCAB)


def build_engine(
    settings: EngineSettings, target: Path, drafter: Path | None, tuning: Path | None, output: Path
) -> None:
    """Writes an engine directory.

    Args:
        settings: the engine's row.
        target: manifest of the checkpoint in the row's precision.
        drafter: manifest of the drafter; needed when the row has one.
        tuning: manifest of the measured draft plan; needed when the row leaves it open.
        output: manifest of the engine.
    Raises FourfoldError when the checkpoint is not in that precision, in dtypes and bytes, or the drafter does not fit.
    """
    if settings.backend != "torch":
        raise FourfoldError(f"backend {settings.backend} is built by compile_engine and pack_engine; use backend torch")
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
    plan = _plan(settings, tuning)
    if drafter is not None and settings.drafter == "redrafter":
        _check_drafter(drafter, config, plan)
    if tuning is not None:
        inputs["tuning"] = tuning
    ends = end_token_ids(source, load_tokenizer(source))
    with write_artifact(
        output,
        stage="build_engine",
        settings=settings.model_dump(mode="json"),
        inputs=inputs,
        libraries=["torch", "safetensors", "transformers"],
    ) as staging:
        staging.facts["plan"] = plan.to_json()
        if tuning is not None:
            staging.facts["tuning_seconds"] = read_manifest(tuning)["seconds"]
        save_file(weights, staging.path / "model.safetensors", metadata={"format": "pt"})
        _copy(source, staging.path, TOKENIZER_FILES)
        if "drafter" in inputs:
            (staging.path / "drafter").mkdir()
            _copy(inputs["drafter"].parent, staging.path / "drafter", DRAFTER_FILES)
        engine = {
            "settings": settings.model_dump(mode="json"),
            "model": config.to_dict(),
            "end_token_ids": list(ends),
            "plan": plan.to_json(),
            "weight_bytes": bytes_by_dtype([staging.path / "model.safetensors"]),
        }
        (staging.path / "engine.json").write_text(dump_json(engine), encoding="utf-8")


def _plan(settings: EngineSettings, tuning: Path | None) -> DraftPlan:
    """What the engine drafts. Raises FourfoldError when the row leaves it open and nothing was measured."""
    if settings.drafter == "none":
        return DraftPlan({1: NO_DRAFTS})
    if settings.is_tuned:
        if tuning is None:
            raise FourfoldError("the engine's row says auto: give the manifest of tune_engine with --tuning")
        return DraftPlan.from_json(read_manifest(tuning, "tune_engine")["plan"])
    assert settings.beam_width != "auto"
    assert settings.beam_length != "auto"
    assert settings.draft_min_p != "auto"
    assert settings.draft_tokens != "auto"
    return DraftPlan.fixed(settings.beam_width, settings.beam_length, settings.draft_min_p, settings.draft_tokens)


def _check_drafter(manifest: Path, config: TransformerConfig, plan: DraftPlan) -> None:
    """Raises FourfoldError when a drafter was made for another model or for fewer drafts, or is broken."""
    directory = manifest.parent
    trained = read_manifest(manifest, "train_drafter")["predict_tokens"]
    drafter = load_redrafter(directory)
    check_target(drafter.config, config, directory)
    if plan.beam_width > drafter.config.num_logits:
        raise FourfoldError(
            f"beam_width is {plan.beam_width}, but {directory} drafts among {drafter.config.num_logits} tokens; "
            "lower it"
        )
    if plan.beam_length - 1 > trained:
        raise FourfoldError(
            f"beam_length is {plan.beam_length}, but {directory} was trained for {trained} drafts, hence at most "
            f"{trained + 1}; lower it or raise drafter.training.predict_tokens"
        )
    _check_finite(drafter.state_dict(), directory)


def _check_finite(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Raises FourfoldError naming a tensor that holds a NaN or an infinity."""
    if (broken := first_not_finite(tensors.items())) is not None:
        raise FourfoldError(f"{directory}: tensor {broken} holds a NaN or an infinity; make the checkpoint again")


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)


def row_options(settings: EngineSettings, target: Transformer) -> dict[str, Any]:
    """Arguments of an LLMEngine that an engine's row decides.

    Raises FourfoldError when the row wants an FP8 cache on a GPU without FP8.
    """
    return {
        "fp8_drafter": settings.fp8_drafter and settings.precision == "fp8" and target.device.type == "cuda",
        "kv_cache_dtype": cache_dtype(settings.kv_cache_dtype, target.device),
        "max_num_seqs": settings.max_num_seqs,
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }


def load_engine(directory: Path, device: str = "auto", enable_prefix_caching: bool = False) -> LLMEngine:
    """Loads an engine directory. Raises FourfoldError when it is incomplete or does not fit the device.

    With `enable_prefix_caching`, prompts that begin as ended requests did are not read from their start again.

    The engine's `info` holds precision, drafter, plan, backend, weight_bytes (by dtype), compute_dtype, device,
    device_type, fp8_emulated, kv_cache_bytes, draft_table_bytes and load_time (seconds).
    """
    begin = time.perf_counter()
    read_manifest(directory / "manifest.json")
    engine: dict[str, Any] = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
    settings = EngineSettings.model_validate(engine["settings"])
    place = resolve_device(device)
    check_device(place, settings.precision, fp8_lm_head=settings.fp8_lm_head)
    dtype = compute_dtype(place)
    config = TransformerConfig(**engine["model"])
    weights = load_file(directory / "model.safetensors")
    check_precision(weights, config, settings.precision)
    target = build_transformer(config, weights, place, dtype, fp8_lm_head=settings.fp8_lm_head)
    drafter = load_redrafter(directory / "drafter", dtype, place) if settings.drafter == "redrafter" else None
    result = LLMEngine(
        target,
        load_tokenizer(directory),
        end_token_ids=tuple(engine["end_token_ids"]),
        drafter=drafter,
        plan=DraftPlan.from_json(engine["plan"]),
        enable_prefix_caching=enable_prefix_caching,
        **row_options(settings, target),
    )
    result.info = {
        "precision": settings.precision,
        "drafter": settings.drafter,
        "plan": result.plan.to_json(),
        "backend": settings.backend,
        "weight_bytes": engine["weight_bytes"],
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": device_name(str(place)),
        "device_type": place.type,
        "fp8_emulated": (settings.precision == "fp8" or settings.fp8_lm_head) and place.type == "cpu",
        "kv_cache_bytes": result.kv_cache_bytes,
        "draft_table_bytes": result.draft_table_bytes,
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
