"""Opens a checkpoint directory and says whether the rest of the workflow can use it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fourfold.artifacts.tensors import first_not_finite, read_header
from fourfold.config.problems import Prompt
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer, render_prompt
from fourfold.modeling.config import TransformerConfig

DTYPES = ("BF16", "F16", "F32")
INDEX = "model.safetensors.index.json"


def check_checkpoint(directory: Path, source: str) -> dict[str, Any]:
    """Checks architecture, tokenizer, chat template, end tokens, and name, shape, dtype and values of every tensor.

    Args:
        directory: the checkpoint.
        source: what the error messages call it.
    Returns the facts for the manifest: architecture, number of parameters, end tokens.
    Raises FourfoldError with the first thing that is wrong.
    """
    # The engine's own reader: what it refuses must not be found after an hour of training.
    shape = TransformerConfig.from_huggingface(directory / "config.json", f"{source}: config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers' errors share no base
        raise FourfoldError(f"{source}: config.json: {' '.join(str(error).split())[:200]}") from None
    tokenizer = load_tokenizer(directory, source)
    if len(tokenizer) > shape.vocab_size:
        raise FourfoldError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but config.json means {shape.vocab_size}; "
            "take both from the same model"
        )
    render_prompt(tokenizer, Prompt(), "1 + 1")
    return {
        "architecture": shape.architecture,
        "parameters": check_tensors(directory, config, source),
        "end_token_ids": list(end_token_ids(directory, tokenizer)),
    }


def check_tensors(directory: Path, config: PretrainedConfig, source: str) -> int:
    """Compares the safetensors headers with what the configuration asks for, then reads the weights once.

    Tied embeddings are one tensor: `lm_head.weight` may be left out. Returns the parameter count. Raises FourfoldError
    naming the file or the tensor that is missing, cut, of a wrong shape or dtype, or holds a value that is no number.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    _check_shards(directory, source)
    files = sorted(directory.glob("*.safetensors"))
    found = {name: info for file in files for name, info in _header(file, source).items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise FourfoldError(
            f"{source}: tensor {missing[0]} is missing (of {len(missing)}); the checkpoint is not whole"
        )
    for name, shape in expected.items():
        if found[name]["shape"] != shape:
            raise FourfoldError(f"{source}: tensor {name} has shape {found[name]['shape']}, config.json means {shape}")
        if (dtype := found[name]["dtype"]) not in DTYPES:
            raise FourfoldError(
                f"{source}: tensor {name} is {dtype}, one of {', '.join(DTYPES)} is expected; "
                "take the checkpoint before its quantisation"
            )
    try:
        broken = first_not_finite(_tensors(files, expected.keys()))
    except SafetensorError as error:
        raise FourfoldError(f"{source}: broken weights ({error}); fetch or save them again") from None
    if broken is not None:
        raise FourfoldError(f"{source}: tensor {broken} holds a NaN or an infinity; fetch or save the weights again")
    return sum(parameter.numel() for parameter in model.parameters())


def _check_shards(directory: Path, source: str) -> None:
    """Raises FourfoldError for a file that the checkpoint's index names and that is not there."""
    if not (directory / INDEX).is_file():
        return
    try:
        shards = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FourfoldError(f"{source}: {INDEX} is no index of weights; fetch or save it again") from None
    if missing:
        raise FourfoldError(
            f"{source}: {missing[0]} is missing (of {len(missing)}), which {INDEX} names; fetch or save it again"
        )


def _header(file: Path, source: str) -> dict[str, dict[str, Any]]:
    try:
        return read_header(file)
    except ValueError as error:
        raise FourfoldError(f"{source}: {file.name} is cut or broken: {error}; fetch or save it again") from None


def _tensors(files: list[Path], names: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in names:
                    yield name, tensors.get_tensor(name)
