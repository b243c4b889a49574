"""Stage pack_engine: what trtllm-build wrote becomes an engine, with the tokenizer and all that serving needs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json
from fourfold.config.stages import TensorrtLlmStage
from fourfold.errors import FourfoldError
from fourfold.trtllm.commands import max_num_tokens
from fourfold.trtllm.tokenizer import TOKENIZER, copy_tokenizer


def pack_engine(settings: TensorrtLlmStage, checkpoint: Path, compiled: Path, output: Path) -> None:
    """Writes an engine directory: the ranks' engines (hard links where that is possible), tokenizer, `engine.json`.

    Args:
        settings: the engine's row, and what all of TensorRT-LLM's engines share.
        checkpoint: manifest of the checkpoint that the engine was built from.
        compiled: the `config.json` that trtllm-build wrote; the engines lie beside it.
        output: manifest of the engine.
    Raises FourfoldError when the engine is not what the row asks for.
    """
    facts = read_manifest(checkpoint, "convert_checkpoint", "merge_drafter")
    limits = check_compiled(compiled, settings)
    with write_artifact(
        output,
        # Its kind: whatever builds an engine, its artifact is read alike.
        stage="build_engine",
        settings=settings.engine.model_dump(mode="json"),
        inputs={"checkpoint": checkpoint, "compiled": compiled},
    ) as staging:
        copy_tokenizer(checkpoint.parent / TOKENIZER, staging.path)
        for path in [compiled, *engine_files(compiled, settings)]:
            _link(path, staging.path / path.name)
        engine = {
            "settings": settings.engine.model_dump(mode="json"),
            "tensorrt_llm": settings.tensorrt_llm.model_dump(mode="json"),
            "limits": limits,
            "model": facts["model"],
            "end_token_ids": facts["end_token_ids"],
            "weight_bytes": facts["tensor_bytes"],
        }
        (staging.path / "engine.json").write_text(dump_json(engine), encoding="utf-8")


def engine_files(compiled: Path, settings: TensorrtLlmStage) -> list[Path]:
    """The ranks' engines. Raises FourfoldError for one that is missing or empty."""
    files = [compiled.with_name(f"rank{rank}.engine") for rank in range(settings.engine.tensor_parallel_size)]
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            raise FourfoldError(f"{file}: is missing or empty; delete {compiled.parent} and run again")
    return files


def check_compiled(compiled: Path, settings: TensorrtLlmStage) -> dict[str, int]:
    """Compares what was built with what was asked for; the builder changes limits without an error.

    Returns the engine's own limits: max_batch_size, max_num_tokens, max_seq_len. Raises FourfoldError.
    """
    try:
        config: dict[str, Any] = json.loads(compiled.read_text(encoding="utf-8"))
        build, model = config["build_config"], config["pretrained_config"]
        limits = {key: int(build[key]) for key in ("max_batch_size", "max_num_tokens", "max_seq_len")}
        found = {"version": config["version"], "tp_size": model["mapping"]["tp_size"]}
        drafter = (model.get("redrafter_num_beams", 0), model.get("redrafter_draft_len_per_beam", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FourfoldError(
            f"{compiled}: no engine's configuration ({error}); delete its folder and run again"
        ) from None
    engine = settings.engine
    asked: dict[str, Any] = {"version": settings.tensorrt_llm.version, "tp_size": engine.tensor_parallel_size}
    for key, value in asked.items():
        if found[key] != value:
            raise FourfoldError(
                f"{compiled}: {key} is {found[key]}, {value} was asked for; delete its folder and run again"
            )
    drafts = (engine.beam_width, int(engine.beam_length) - 1) if engine.drafter == "redrafter" else (0, 0)
    if drafter != drafts:
        raise FourfoldError(
            f"{compiled}: built for {drafter[0]} beams of {drafter[1]} drafts, {drafts[0]} of {drafts[1]} were asked "
            "for; delete its folder and run again"
        )
    least = {
        "max_batch_size": engine.max_num_seqs,
        "max_num_tokens": max_num_tokens(engine, settings.tensorrt_llm),
        "max_seq_len": engine.max_model_len,
    }
    for key, value in least.items():
        if limits[key] < value:
            raise FourfoldError(f"{compiled}: {key} is {limits[key]}, less than the {value} that was asked for")
    return limits


def _link(source: Path, target: Path) -> None:
    # Engines are as large as the model, and never changed in place.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
