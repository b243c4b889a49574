"""Small TensorRT-LLM checkpoints, and the Hugging Face tensors put together again from their ranks."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import save_reference, tiny_reference
from torch import Tensor

from fourfold.config.stages import MergeStage
from fourfold.modeling.checkpoint import read_weights
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, save_redrafter
from fourfold.quantize.on_device import to_fp8
from fourfold.trtllm.convert import write_checkpoint

BIASED = {"attention_bias": True, "mlp_bias": True}
LAYER = {
    "attention.dense.weight": "self_attn.o_proj.weight",
    "attention.dense.bias": "self_attn.o_proj.bias",
    "mlp.fc.weight": "mlp.gate_proj.weight",
    "mlp.fc.bias": "mlp.gate_proj.bias",
    "mlp.gate.weight": "mlp.up_proj.weight",
    "mlp.gate.bias": "mlp.up_proj.bias",
    "mlp.proj.weight": "mlp.down_proj.weight",
    "mlp.proj.bias": "mlp.down_proj.bias",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_layernorm.weight": "post_attention_layernorm.weight",
}
BY_COLUMNS = ("attention.dense.weight", "mlp.proj.weight")
ON_EVERY_RANK = ("attention.dense.bias", "mlp.proj.bias", "layernorm.weight", "ln_f.weight")


def make_checkpoint(folder: Path, architecture: str, precision: str, ranks: int, **changes: Any) -> tuple[Path, Path]:
    """A random model, and its TensorRT-LLM checkpoint; returns both directories. In fp8, of random ranges."""
    source, directory = folder / "model", folder / "checkpoint"
    save_reference(tiny_reference(architecture, **changes), source)
    model, weights = read_weights(source)
    if precision == "fp8":
        layers = [
            f"layers.{i}.{name}" for i in range(model.num_hidden_layers) for name in ("qkv", "o", "gate_up", "down")
        ]
        weights = to_fp8(weights, {name: torch.tensor(1.0 + i) for i, name in enumerate(layers)})
    directory.mkdir()
    write_checkpoint(model, weights, precision, ranks, directory)
    return source, directory


def make_drafter(folder: Path, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Path:
    """A random drafter for the tiny models; returns its directory."""
    torch.manual_seed(1)
    config = RedrafterConfig(**{"vocab_size": 320, "hidden_size": 64, "exit_dim": 128, **shape})
    size = config.draft_vocab_size
    folder.mkdir()
    save_redrafter(Redrafter(config, None if size is None else torch.arange(size)), folder, dtype)
    return folder


def merge_settings(ranks: int, beams: int = 1, drafts: int = 3) -> MergeStage:
    """What merge_drafter reads."""
    return MergeStage(
        tensor_parallel_size=ranks,
        redrafter_num_beams=beams,
        redrafter_draft_len_per_beam=drafts,
        redrafter_greedy_search=True,
    )


def rank_tensors(directory: Path) -> list[dict[str, Tensor]]:
    """The tensors of each rank."""
    config = json.loads((directory / "config.json").read_text())
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(config["mapping"]["tp_size"])]


def whole(name: str, ranks: list[dict[str, Tensor]]) -> Tensor:
    """A tensor put together from its parts."""
    parts = [tensors[name] for tensors in ranks]
    if name.endswith(ON_EVERY_RANK):
        assert all(torch.equal(as_bytes(part), as_bytes(parts[0])) for part in parts)
        return parts[0]
    return join(parts, dim=1 if name.endswith(BY_COLUMNS) else 0)


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenates tensors of any dtype."""
    if parts[0].dtype == torch.float8_e4m3fn:
        return torch.cat([part.view(torch.uint8) for part in parts], dim).view(torch.float8_e4m3fn)
    return torch.cat(parts, dim)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8)


def rebuild(directory: Path, layers: int) -> dict[str, Tensor]:
    """Hugging Face's tensors, from a checkpoint's ranks; padding of the vocabulary is checked and taken away."""
    config = json.loads((directory / "config.json").read_text())
    ranks = rank_tensors(directory)
    tensors = {"model.norm.weight": whole("transformer.ln_f.weight", ranks)}
    for theirs, ours in (("transformer.vocab_embedding", "model.embed_tokens"), ("lm_head", "lm_head")):
        table = whole(f"{theirs}.weight", ranks)
        assert not table[config["vocab_size"] :].any()
        tensors[f"{ours}.weight"] = table[: config["vocab_size"]]
    for i in range(layers):
        source, target = f"transformer.layers.{i}", f"model.layers.{i}"
        for theirs, ours in LAYER.items():
            if f"{source}.{theirs}" in ranks[0]:
                tensors[f"{target}.{ours}"] = whole(f"{source}.{theirs}", ranks)
        for kind in ("weight", "bias"):
            if f"{source}.attention.qkv.{kind}" in ranks[0]:
                parts = [tensors_of[f"{source}.attention.qkv.{kind}"] for tensors_of in ranks]
                for name, tensor in split_qkv(parts, config).items():
                    tensors[f"{target}.self_attn.{name}_proj.{kind}"] = tensor
    return tensors


def split_qkv(parts: list[Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """q, k and v of all heads; ranks that share a key/value head must agree on it."""
    size, head = len(parts), config["head_size"]
    query = config["num_attention_heads"] // size * head
    heads = config["num_key_value_heads"]
    held = max(heads // size, 1) * head
    k = [part[query : query + held] for part in parts]
    v = [part[query + held :] for part in parts]
    copies = max(size // heads, 1)
    for tensors in (k, v):
        assert all(len(tensor) == held for tensor in tensors)
        for rank, tensor in enumerate(tensors):
            assert torch.equal(as_bytes(tensor), as_bytes(tensors[rank // copies * copies]))
    return {"q": join([part[:query] for part in parts]), "k": join(k[::copies]), "v": join(v[::copies])}
