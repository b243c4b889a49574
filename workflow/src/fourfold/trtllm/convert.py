"""Stage convert_checkpoint: the TensorRT-LLM checkpoint of a model or of its FP8 form, split over ranks.

The checkpoint is written from the unified one, not by ModelOpt's own export: its bytes and scales are then those that
the drafter was trained for and that the logits were compared with, nothing is calibrated twice, and no GPU and no
TensorRT-LLM are needed. Int8 weights are the exception: TensorRT-LLM rounds them itself, into a layout of its own, from
the model's weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import dump_json
from fourfold.artifacts.tensors import first_not_finite
from fourfold.config.stages import ConvertStage
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer
from fourfold.modeling.checkpoint import Weights, check_precision, read_weights
from fourfold.modeling.config import TransformerConfig
from fourfold.progress import logger, progress
from fourfold.trtllm.layout import CONFIG, check_split, checkpoint_config, rank_file
from fourfold.trtllm.tokenizer import TOKENIZER, copy_tokenizer
from fourfold.trtllm.validate import validate_checkpoint

Span = tuple[int, int]


def convert_checkpoint(settings: ConvertStage, target: Path, output: Path) -> None:
    """Writes the checkpoint, checks it, and puts the tokenizer beside it.

    Args:
        settings: the precision and the number of ranks.
        target: manifest of the checkpoint of that precision; for int8_wo that of the model itself.
        output: manifest of the TensorRT-LLM checkpoint.
    Raises FourfoldError when the target is of another precision, holds no numbers or cannot be split.
    """
    read_manifest(target, "fetch_model", "quantize_model")
    source, ranks = target.parent, settings.tensor_parallel_size
    model, weights = read_weights(source)
    check_precision(weights, model, "bf16" if settings.precision == "int8_wo" else settings.precision)
    check_split(model, ranks)
    if (broken := first_not_finite(weights.items())) is not None:
        raise FourfoldError(f"{source}: tensor {broken} holds a NaN or an infinity; make the checkpoint again")
    ends = end_token_ids(source, load_tokenizer(source))
    with write_artifact(
        output,
        stage="convert_checkpoint",
        settings=settings.model_dump(),
        inputs={"target": target},
        libraries=["torch", "safetensors"],
    ) as staging:
        write_checkpoint(model, weights, settings.precision, ranks, staging.path)
        validate_checkpoint(staging.path)
        (staging.path / TOKENIZER).mkdir()
        copy_tokenizer(source, staging.path / TOKENIZER)
        # What the engine's directory will say of the model.
        staging.facts = {"model": model.to_dict(), "end_token_ids": list(ends)}
    logger.info("%s checkpoint for %d GPUs written and checked", settings.precision, ranks)


def write_checkpoint(model: TransformerConfig, weights: Weights, precision: str, ranks: int, directory: Path) -> None:
    """Writes `config.json` and a file for each rank; one rank at a time is in memory beside the weights.

    Args:
        model: the shape.
        weights: fused weights, as of `read_weights`.
        precision: bf16, fp8 or int8_wo (then the weights are the model's).
        ranks: the number of GPUs that share the model.
        directory: an existing directory.
    Raises FourfoldError for weights that have no place in the format.
    """
    dtype = str(weights["embed"].dtype).removeprefix("torch.")
    config = checkpoint_config(model, precision, dtype, ranks, *_biases(model, weights))
    (directory / CONFIG).write_text(dump_json(config), encoding="utf-8")
    with progress("convert", ranks, "ranks") as task:
        for rank in range(ranks):
            tensors = rank_tensors(model, weights, ranks, rank)
            save_file(tensors, directory / rank_file(rank), metadata={"format": "pt"})
            task.advance()


def rank_tensors(model: TransformerConfig, weights: Weights, ranks: int, rank: int) -> dict[str, Tensor]:
    """The tensors of one rank, by TensorRT-LLM's names. Raises FourfoldError for a scale that is not one number."""
    head = weights.get("lm_head", weights["embed"])
    tensors = {
        "transformer.vocab_embedding.weight": _vocabulary(weights["embed"], ranks, rank),
        "transformer.ln_f.weight": weights["norm"],
        "lm_head.weight": _vocabulary(head, ranks, rank),
    }
    rows = _rows(model, ranks, rank)
    columns = {
        "attention.dense": _part(model.num_attention_heads * model.head_dim, ranks, rank),
        "mlp.proj": _part(model.intermediate_size, ranks, rank),
    }
    fused = {
        "attention.qkv": "qkv",
        "attention.dense": "o",
        # TensorRT-LLM calls gate_proj fc, and up_proj gate.
        "mlp.fc": "gate_up",
        "mlp.gate": "gate_up",
        "mlp.proj": "down",
    }
    for i in range(model.num_hidden_layers):
        source, target = f"layers.{i}", f"transformer.layers.{i}"
        tensors[f"{target}.input_layernorm.weight"] = weights[f"{source}.input_norm"]
        tensors[f"{target}.post_layernorm.weight"] = weights[f"{source}.post_norm"]
        for name, stored in fused.items():
            weight, bias = weights[f"{source}.{stored}.weight"], weights.get(f"{source}.{stored}.bias")
            if name in rows:
                tensors[f"{target}.{name}.weight"] = _take(weight, rows[name])
                bias = None if bias is None else _take(bias, rows[name])
            else:
                begin, end = columns[name]
                tensors[f"{target}.{name}.weight"] = weight[:, begin:end]
            if bias is not None:
                # Of a layer that is split by columns, every rank has the whole bias; one of them adds it.
                tensors[f"{target}.{name}.bias"] = bias
            for scale, theirs in (("weight_scale", "weights"), ("input_scale", "activation")):
                if (value := weights.get(f"{source}.{stored}.{scale}")) is not None:
                    tensors[f"{target}.{name}.{theirs}_scaling_factor"] = _scalar(value, f"{source}.{stored}.{scale}")
    # Copies: safetensors refuses tensors that share their memory.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _rows(model: TransformerConfig, ranks: int, rank: int) -> dict[str, list[Span]]:
    """Rows of the fused weights that a rank holds, in its order."""
    query, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if model.num_key_value_heads >= ranks:
        begin, end = _part(kv, ranks, rank)
    else:
        # More ranks than heads: neighbours hold the same one.
        begin = rank // (ranks // model.num_key_value_heads) * model.head_dim
        end = begin + model.head_dim
    gate_begin, gate_end = _part(model.intermediate_size, ranks, rank)
    size = model.intermediate_size
    return {
        "attention.qkv": [
            _part(query, ranks, rank),
            (query + begin, query + end),
            (query + kv + begin, query + kv + end),
        ],
        "mlp.fc": [(gate_begin, gate_end)],
        "mlp.gate": [(size + gate_begin, size + gate_end)],
    }


def _part(size: int, ranks: int, rank: int) -> Span:
    return size // ranks * rank, size // ranks * (rank + 1)


def _take(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    # By bytes: not every dtype has a concatenation of its own.
    parts = [tensor[begin:end].contiguous().view(torch.uint8) for begin, end in spans]
    return torch.cat(parts).view(tensor.dtype)


def _vocabulary(table: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's rows of the embedding or the output layer, zeros after the last token."""
    size = -(-len(table) // ranks)
    part = table[rank * size : (rank + 1) * size]
    return torch.cat([part, part.new_zeros(size - len(part), table.shape[1])])


def _scalar(scale: Tensor, name: str) -> Tensor:
    if scale.numel() != 1:
        raise FourfoldError(
            f"{name}: the layers that TensorRT-LLM computes as one have different scales; quantise the model with "
            "fourfold, which shares them"
        )
    return scale.float().reshape(1)


def _biases(model: TransformerConfig, weights: Weights) -> tuple[bool, bool]:
    """Whether attention and MLP have biases. Raises FourfoldError where some of their layers have and some have not."""
    has = {name: f"layers.0.{name}.bias" in weights for name in ("qkv", "o", "gate_up", "down")}
    attention = (True, False) if model.architecture == "Qwen2ForCausalLM" else (has["qkv"], has["qkv"])
    if (has["qkv"], has["o"]) != attention or has["gate_up"] != has["down"]:
        layers = ", ".join(name for name, bias in has.items() if bias) or "no layer"
        raise FourfoldError(f"biases of {layers} alone have no place in TensorRT-LLM's {model.architecture}")
    return has["qkv"], has["gate_up"]
