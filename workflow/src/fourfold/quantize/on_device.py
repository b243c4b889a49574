"""FP8 weights made where the model is, for measurements: of fused weights, with the ranges of one calibration pass.

The workflow's checkpoints are made by NVIDIA ModelOpt (`quantize.fp8`). A model that exists on a GPU alone, as the
carrier of a measurement does, is quantised here the same way: E4M3, a scale for each fused weight and for its input,
both from the largest absolute value.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fourfold.modeling.checkpoint import FUSED, Weights
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
