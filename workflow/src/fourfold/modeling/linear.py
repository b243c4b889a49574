"""Linear layers of the engine: one kind for each way that weights are stored and computed.

| stored | CPU (float32) | GPU (bfloat16) |
|---|---|---|
| bf16 | PackedLinear: oneDNN's blocked layout, packed once | DenseLinear |
| fp8 | Fp8Linear: E4M3 values exact in float32, activations rounded to E4M3 | ScaledLinear: FP8 tensor cores |
| int8_wo | PackedLinear of the dequantised weight | Int8Linear |

On a CPU the packed layout reads the weights at full bandwidth for 1 to 16 rows, and a row's result has the same bits
whatever other rows are computed with it: speculative decoding is exact because of that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
E4M3_MAX = 448.0


@dataclass
class LinearWeights:
    """A linear layer as it is stored.

    weight [out, in] in bfloat16, float8_e4m3fn or int8; bias [out] or None; weight_scale float32, a scalar or [out];
    input_scale float32 scalar (fp8 only): the real weight is `weight * weight_scale`.
    """

    weight: Tensor
    bias: Tensor | None = None
    weight_scale: Tensor | None = None
    input_scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The real weight, float32 [out, in]."""
        weight = self.weight.float()
        if self.weight_scale is None:
            return weight
        return weight * self.weight_scale.reshape(-1, 1)


def make_linear(weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Linear:
    """The layer for this storage on this device. `dtype` is what activations are computed in."""
    stored = weights.weight.dtype
    on_cpu = device.type == "cpu"
    if stored == torch.float8_e4m3fn:
        return Fp8Linear(weights, dtype) if on_cpu else ScaledLinear(weights, device, dtype)
    if stored == torch.int8 and not on_cpu:
        return Int8Linear(weights, device, dtype)
    bias = None if weights.bias is None else weights.bias.to(device, dtype)
    return pack_linear(weights.dequantized().to(dtype) if on_cpu else weights.weight.to(device, dtype), bias)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The quickest layer for a plain weight [out, in]: packed on a CPU in float32, as it is elsewhere."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


class DenseLinear:
    """The plain product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """float32 on a CPU, the weight in oneDNN's blocked layout; the plain weight is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # No batch size is given as a hint: with one, the layout depends on it and rows lose their fixed bits.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def quantize_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded to nearest even and saturated, as float8_e4m3fn."""
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class Fp8Linear:
    """FP8 arithmetic on a CPU: E4M3 operands, products and sums in float32, both scales applied to the sum.

    E4M3 values and their products are exact in float32, as they are in a GPU's FP8 unit; it is no faster than float32.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        assert weights.weight_scale is not None
        assert weights.input_scale is not None
        self.product = pack_linear(weights.weight.to(dtype))
        self.input_scale = weights.input_scale
        self.scale = (weights.weight_scale * weights.input_scale).to(dtype)
        self.bias = None if weights.bias is None else weights.bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        y = self.product(quantize_e4m3(x, self.input_scale).to(x.dtype)).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


class ScaledLinear:
    """FP8 tensor cores with per-tensor scales."""

    def __init__(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> None:
        assert weights.weight_scale is not None
        assert weights.input_scale is not None
        self.weight = weights.weight.to(device)
        self.input_scale = weights.input_scale.to(device)
        self.bias = None if weights.bias is None else weights.bias.to(device, dtype)
        self.dtype = dtype
        scale = weights.weight_scale.to(device)
        # Rows with scales of their own (fused layers that were quantised apart) are scaled after the product.
        self.tensor_scale = scale if scale.numel() == 1 else torch.ones((), device=device)
        self.row_scale = None if scale.numel() == 1 else scale.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        rows = quantize_e4m3(x.reshape(-1, x.shape[-1]), self.input_scale)
        fused_bias = self.bias if self.row_scale is None else None
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.tensor_scale,
            bias=fused_bias,
            out_dtype=self.dtype,
        )
        if self.row_scale is not None:
            y = y * self.row_scale if self.bias is None else y * self.row_scale + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Linear:
    """int8 weights in memory, widened as they are read; activations stay in `dtype`."""

    def __init__(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> None:
        assert weights.weight_scale is not None
        self.weight = weights.weight.to(device)
        self.scale = weights.weight_scale.to(device, dtype)
        self.bias = None if weights.bias is None else weights.bias.to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias
