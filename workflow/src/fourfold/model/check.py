"""Opens a checkpoint directory and says whether the rest of the workflow can use it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fourfold.artifacts.tensors import read_header
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM")


def check_checkpoint(directory: Path, source: str) -> dict[str, Any]:
    """Checks architecture, tokenizer, end tokens, and the name and shape of every tensor; loads no weights.

    Args:
        directory: the checkpoint.
        source: what the error messages call it.
    Returns the facts for the manifest: architecture, number of parameters, end tokens.
    Raises FourfoldError with the first thing that is wrong.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FourfoldError(f"{source}: no readable config.json ({' '.join(str(error).split())[:200]})") from None
    architectures = config.architectures or []
    if not architectures or architectures[0] not in SUPPORTED:
        found = ", ".join(architectures) or "none named in config.json"
        raise FourfoldError(f"{source}: architecture {found} is not supported; choose one of {', '.join(SUPPORTED)}")
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise FourfoldError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    return {
        "architecture": architectures[0],
        "parameters": check_tensors(directory, config, source),
        "end_token_ids": list(end_token_ids(directory, tokenizer)),
    }


def check_tensors(directory: Path, config: PretrainedConfig, source: str) -> int:
    """Compares the safetensors headers with the shapes that the configuration asks for; returns the parameter count.

    Tied embeddings are one tensor: `lm_head.weight` may be left out. Raises FourfoldError.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    files = sorted(directory.glob("*.safetensors"))
    found = {name: info["shape"] for file in files for name, info in read_header(file).items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise FourfoldError(
            f"{source}: tensor {missing[0]} is missing (of {len(missing)}); the checkpoint is not whole"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise FourfoldError(f"{source}: tensor {name} has shape {found[name]}, config.json means {shape}")
    return sum(parameter.numel() for parameter in model.parameters())
