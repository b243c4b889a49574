"""FP8 weights made where the model is, for measurements: of fused weights, with the ranges of one calibration pass.

The workflow's checkpoints are made by NVIDIA ModelOpt (`quantize.fp8`). A model that exists on a GPU alone, as the
carrier of a measurement does, is quantised here the same way: E4M3, a scale for each fused weight and for its input,
both from the largest absolute value.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.modeling.checkpoint import FUSED, Weights
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.linear import E4M3_MAX, Linear, quantize_e4m3
from fourfold.modeling.transformer import Transformer


class _Ranged:
    """A layer that remembers the largest absolute value it was given."""

    def __init__(self, layer: Linear, device: torch.device) -> None:
        self.layer, self.largest = layer, torch.zeros((), device=device)

    def __call__(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().max().float())
        return self.layer(x)


def input_ranges(target: Transformer, texts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Largest absolute input of each fused layer over some texts: float32 scalars by `layers.{i}.{name}`.

    Args: texts int64 [batch, tokens] each.
    """
    ranges: dict[str, Tensor] = {}
    try:
        for layer in target.layers:
            for name in FUSED:
                setattr(layer, name, _Ranged(getattr(layer, name), target.device))
        for token_ids in texts:
            target.hidden_states(token_ids)
    finally:
        for i, layer in enumerate(target.layers):
            for name in FUSED:
                if isinstance(ranged := getattr(layer, name), _Ranged):
                    ranges[f"layers.{i}.{name}"] = ranged.largest
                    setattr(layer, name, ranged.layer)
    return ranges


def to_fp8(weights: Weights, ranges: dict[str, Tensor]) -> Weights:
    """Fused bf16 weights → fused FP8 weights; what is no layer's matrix is shared, not copied.

    Args: weights as of `read_weights`; ranges from `input_ranges`.
    """
    result = dict(weights)
    for name, largest in ranges.items():
        weight = weights[f"{name}.weight"]
        # A matrix of zeros has no range; any scale will do.
        scale = (weight.abs().max().float() / E4M3_MAX).clamp_(min=1e-12)
        result[f"{name}.weight"] = quantize_e4m3(weight.float(), scale)
        result[f"{name}.weight_scale"] = scale
        result[f"{name}.input_scale"] = (largest / E4M3_MAX).clamp(min=1e-12)
    return result


def save_weights(weights: Weights, config: TransformerConfig, directory: Path) -> None:
    """Writes fused weights as the `model.safetensors` that `read_weights` reads: layers apart, each with its scales."""
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    rows = {"qkv": [heads, kv, kv], "gate_up": [config.intermediate_size] * 2}
    apart = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    if "lm_head" in weights:
        apart["lm_head.weight"] = weights["lm_head"]
    for i in range(config.num_hidden_layers):
        source, target = f"layers.{i}", f"model.layers.{i}"
        apart[f"{target}.input_layernorm.weight"] = weights[f"{source}.input_norm"]
        apart[f"{target}.post_attention_layernorm.weight"] = weights[f"{source}.post_norm"]
        for name, parts in FUSED.items():
            for key in ("weight", "bias", "weight_scale", "input_scale"):
                if (fused := weights.get(f"{source}.{name}.{key}")) is None:
                    continue
                split = fused.split(rows.get(name, len(fused))) if fused.dim() else [fused] * len(parts)
                apart |= {f"{target}.{part}.{key}": own for part, own in zip(parts, split, strict=True)}
    # Tensors of a file may not share memory.
    save_file({name: tensor.cpu().clone() for name, tensor in apart.items()}, directory / "model.safetensors")
