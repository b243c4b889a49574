"""Stage merge_drafter: a TensorRT-LLM checkpoint with its ReDrafter, as TensorRT-LLM's own example merges them.

It does what `examples/redrafter/convert_checkpoint.py` does, and refuses what that script lets through to fail while
the engine is built.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json
from fourfold.artifacts.tensors import first_not_finite
from fourfold.config.stages import MergeStage
from fourfold.errors import FourfoldError
from fourfold.modeling.redrafter import Redrafter, load_redrafter
from fourfold.progress import progress
from fourfold.trtllm.layout import CONFIG, REDRAFTER, drafter_modules, rank_file
from fourfold.trtllm.tokenizer import TOKENIZER
from fourfold.trtllm.validate import validate_checkpoint


def merge_drafter(settings: MergeStage, checkpoint: Path, drafter: Path, output: Path) -> None:
    """Writes the checkpoint of base and drafter, and checks it.

    Args:
        settings: ranks, beams, drafts of a beam, greedy or sampled.
        checkpoint: manifest of the base's TensorRT-LLM checkpoint.
        drafter: manifest of the drafter, whose `predict_tokens` bounds the drafts.
        output: manifest of the merged checkpoint.
    Raises FourfoldError when the two do not fit each other or the settings.
    """
    facts = read_manifest(checkpoint, "convert_checkpoint")
    trained = read_manifest(drafter, "train_drafter")["predict_tokens"]
    if settings.redrafter_draft_len_per_beam > trained:
        raise FourfoldError(
            f"redrafter_draft_len_per_beam is {settings.redrafter_draft_len_per_beam}, but {drafter.parent} was "
            f"trained for {trained} drafts; lower beam_length to {trained + 1} or raise "
            "drafter.training.predict_tokens"
        )
    with write_artifact(
        output,
        stage="merge_drafter",
        settings=settings.model_dump(),
        inputs={"checkpoint": checkpoint, "drafter": drafter},
        libraries=["torch", "safetensors"],
    ) as staging:
        merge(checkpoint.parent, drafter.parent, settings, staging.path)
        validate_checkpoint(staging.path)
        shutil.copytree(checkpoint.parent / TOKENIZER, staging.path / TOKENIZER)
        staging.facts = {key: facts[key] for key in ("model", "end_token_ids")}


def merge(base: Path, drafter_directory: Path, settings: MergeStage, directory: Path) -> None:
    """Writes `config.json` and the ranks' files of a base checkpoint with a drafter.

    Args:
        base: a TensorRT-LLM checkpoint without a drafter, whoever wrote it.
        drafter_directory: a drafter in recurrent-drafting's format.
        settings: as of `merge_drafter`.
        directory: an existing directory.
    Raises FourfoldError.
    """
    config = validate_checkpoint(base)
    drafter = load_redrafter(drafter_directory)
    _check(config, base, drafter, drafter_directory, settings)
    dtype = getattr(torch, config["dtype"])
    _check_dtype(drafter.state_dict(), dtype, drafter_directory)
    (directory / CONFIG).write_text(dump_json(merged_config(config, drafter, settings)), encoding="utf-8")
    ranks = config["mapping"]["tp_size"]
    with progress("merge", ranks, "ranks") as task:
        for rank in range(ranks):
            tensors = load_file(base / rank_file(rank)) | drafter_tensors(drafter, dtype, ranks, rank)
            save_file(tensors, directory / rank_file(rank), metadata={"format": "pt"})
            task.advance()


def merged_config(config: dict[str, Any], drafter: Redrafter, settings: MergeStage) -> dict[str, Any]:
    """`config.json` of a base checkpoint with a drafter; the base's is left as it is."""
    merged: dict[str, Any] = json.loads(json.dumps(config))
    excluded = merged["quantization"].get("exclude_modules")
    if excluded is not None:
        excluded += [name for name in drafter_modules(drafter.config) if name not in excluded]
    return merged | {
        "architecture": REDRAFTER[config["architecture"]],
        "base_model_architecture": config["architecture"],
        "redrafter_num_layers": drafter.config.num_draft_layers,
        "redrafter_hidden_size": drafter.config.hidden_size,
        "redrafter_exit_dim": drafter.config.exit_dim,
        "redrafter_is_rnn": drafter.config.rnn,
        "redrafter_num_beams": settings.redrafter_num_beams,
        "redrafter_draft_len_per_beam": settings.redrafter_draft_len_per_beam,
        "redrafter_greedy_search": settings.redrafter_greedy_search,
    }


def drafter_tensors(drafter: Redrafter, dtype: torch.dtype, ranks: int, rank: int) -> dict[str, Tensor]:
    """A rank's part of the drafter by TensorRT-LLM's names: each tensor, biases too, split by rows."""
    blocks = drafter.config.num_draft_layers
    names = {f"lm_head.{k}.linear": f"drafter.layers.{k}.linear" for k in range(blocks)}
    names[f"lm_head.{blocks}"] = "drafter.lm_head"
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        module, _, kind = name.rpartition(".")
        size = len(tensor) // ranks
        part = tensor[rank * size : (rank + 1) * size].to(dtype).clone()
        tensors[f"{names.get(module, f'drafter.{module}')}.{kind}"] = part
    return tensors


def _check(config: dict[str, Any], base: Path, drafter: Redrafter, directory: Path, settings: MergeStage) -> None:
    """Raises FourfoldError when base and drafter do not fit each other."""
    if config["architecture"] not in REDRAFTER:
        raise FourfoldError(f"{base}: {config['architecture']} has a drafter already; give the checkpoint without one")
    ranks = config["mapping"]["tp_size"]
    if settings.tensor_parallel_size != ranks:
        raise FourfoldError(
            f"{base}: split over {ranks} ranks, tensor_parallel_size is {settings.tensor_parallel_size}; "
            "convert the checkpoint for as many"
        )
    shape = drafter.config
    if shape.draft_vocab_size is not None:
        raise FourfoldError(
            f"{directory}: drafts among {shape.draft_vocab_size} tokens, TensorRT-LLM's drafter among all "
            f"{shape.vocab_size}, and a head without biases cannot give the others no chance; train one with "
            "drafter.shape.draft_vocab_size null"
        )
    for name in ("hidden_size", "vocab_size"):
        if getattr(shape, name) != config[name]:
            raise FourfoldError(
                f"{directory}: the drafter's {name} is {getattr(shape, name)}, the model's {config[name]}; "
                "train a drafter for this model"
            )
    algorithm = config["quantization"]["quant_algo"]
    if algorithm == "FP8" and shape.has_input_proj:
        raise FourfoldError(
            f"{directory}: exit_dim is {shape.exit_dim}; beside FP8 it must be twice the hidden size, "
            f"{2 * shape.hidden_size}, since TensorRT-LLM would take the input projection for FP8; train one with "
            "drafter.shape.exit_dim null"
        )
    if algorithm is not None and config["quantization"].get("exclude_modules") is None:
        raise FourfoldError(
            f"{base}: quantization.exclude_modules is null, so TensorRT-LLM would take the drafter for {algorithm}; "
            "convert the checkpoint with fourfold, which writes the list"
        )
    for name, size in {
        "vocab_size": shape.vocab_size,
        "exit_dim": shape.exit_dim,
        "hidden_size": shape.hidden_size,
    }.items():
        if size % ranks:
            raise FourfoldError(
                f"{directory}: the drafter's {name} is {size}, which {ranks} ranks cannot share evenly; choose a "
                "tensor_parallel_size that divides it"
            )


def _check_dtype(state: Mapping[str, Tensor], dtype: torch.dtype, directory: Path) -> None:
    """Raises FourfoldError unless the drafter's numbers are the base's, or float32, which is rounded to them."""
    for name, tensor in state.items():
        if tensor.dtype not in (dtype, torch.float32):
            raise FourfoldError(f"{directory}: {name} is {tensor.dtype}, the base {dtype}; save the drafter in that")
    if (broken := first_not_finite((name, tensor.to(dtype)) for name, tensor in state.items())) is not None:
        raise FourfoldError(f"{directory}: tensor {broken} holds a NaN or an infinity; train the drafter again")
