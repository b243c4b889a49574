"""Linear layers of the engine: one kind for each way that weights are stored and computed.

| stored | CPU (float32) | GPU (bfloat16) |
|---|---|---|
| bf16 | HalfLinear: the same values in half precision, packed once | DenseLinear |
| fp8 | Fp8Linear: E4M3 values in a HalfLinear, activations rounded to E4M3 | ScaledLinear: FP8 tensor cores |
| int8_wo | HalfLinear of the integers, rows scaled after the product | Int8Linear |
| bf16, an output matrix that is rounded | EmulatedFp8Head | Fp8Head |
| bf16, a drafter's that is rounded | | RowScaledLinear |

Decoding is bound by the bytes of the weights. bfloat16 (after a shift of the exponent), E4M3 and int8 values are exact
in half precision, so a CPU need not read them as float32: FBGEMM widens them in registers, and 6 rows cost no more than
1. docs/performance.md says why int8 weights are not read as single bytes.
A row's result has the same bits whatever other rows are computed with it, which makes speculative decoding exact.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.errors import FourfoldError

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
    bias = None if weights.bias is None else weights.bias.to(device, dtype)
    if stored == torch.int8 and not on_cpu:
        return Int8Linear(weights, device, dtype)
    if stored == torch.int8 and reads_half(dtype):
        assert weights.weight_scale is not None
        return HalfLinear(weights.weight.to(dtype), bias, weights.weight_scale)
    return pack_linear(weights.dequantized().to(dtype) if on_cpu else weights.weight.to(device, dtype), bias)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The quickest layer for a plain weight [out, in]: packed on a CPU in float32, as it is elsewhere.

    In half precision where that loses nothing, else in float32.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return DenseLinear(weight, bias)
    if reads_half(weight.dtype):
        shift = half_shift(weight)
        if shift is not None:
            return HalfLinear(weight * 2.0**shift, bias, torch.tensor(2.0**-shift))
    return PackedLinear(weight, bias) if torch.backends.mkldnn.is_available() else DenseLinear(weight, bias)


def reads_half(dtype: torch.dtype) -> bool:
    """Whether this CPU has FBGEMM's product of half-precision weights with activations in `dtype`."""
    return dtype == torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines


def half_shift(weight: Tensor) -> int | None:
    """The s for which weight * 2**s is exact in half precision; None if there is none. weight is float32."""
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        return None
    # The largest value just below half precision's largest, so that the smallest keep as many bits as they can.
    shift = 15 - math.frexp(largest)[1] if largest else 0
    scaled = weight * 2.0**shift
    return shift if torch.equal(scaled.half().float(), scaled) else None


@functools.cache
def row_block() -> int:
    """Rows are computed in multiples of this many, so that a row's bits do not depend on the number of rows.

    FBGEMM has a kernel for each number of rows up to 6 or 14, and the smallest ones sum in another order. What is
    enough differs between processors, so it is measured, once, on a small product. 1 if nothing helps.
    """
    generator = torch.Generator().manual_seed(0)
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(32, 64, generator=generator), None)
    x = torch.randn(96, 64, generator=generator)
    for block in (1, 2, 3, 4, 6, 7, 8, 12, 14, 16):
        whole = x[: 96 // block * block]
        alone = torch.cat([torch.ops.quantized.linear_dynamic_fp16(rows, packed) for rows in whole.split(block)])
        counts = range(block, len(whole) + 1, block)
        if all(torch.equal(torch.ops.quantized.linear_dynamic_fp16(x[:n], packed), alone[:n]) for n in counts):
            return block
    return 1


def pad_rows(x: Tensor) -> Tensor:
    """x [rows, features] with zero rows added up to a multiple of row_block(); x itself on a GPU."""
    extra = -x.shape[0] % row_block() if x.device.type == "cpu" else 0
    return F.pad(x, (0, 0, 0, extra)) if extra else x


class HalfLinear:
    """float32 activations, weights in half precision in FBGEMM's layout, sums in float32, scaled at the end."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
        """The layer of the real weight `weight * scale`.

        Args:
            weight: float32 [out, in], each value exact in half precision.
            bias: float32 [out] or None.
            scale: float32, a scalar or [out]; a tensor, since a Python number would be converted at every call.
        """
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        self.bias, self.scale = bias, scale

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.quantized.linear_dynamic_fp16(pad_rows(rows), self.packed)[: rows.shape[0]].mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


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


WIDENED = 2.0**8
"""What the result of `widen_e4m3` is to be multiplied by."""


FEW = 2048
"""Values up to which a table of all 256 is quicker than arithmetic on bits."""
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / WIDENED


def widen_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn → float32, divided by WIDENED; several times as fast as the plain conversion on a CPU.

    Moved into the places of half precision's exponent and significand, the bits of an E4M3 value (subnormals too) are
    that value / 2**8: the exponents' biases are 7 and 15. NaN becomes NaN or 480 / 2**8.
    """
    if x.numel() <= FEW:
        return _E4M3.take(x.view(torch.uint8).long())
    bits = x.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16).float()


class Fp8Linear:
    """FP8 arithmetic on a CPU: E4M3 operands, products and sums in float32, both scales applied to the sum.

    E4M3 values and their products are exact in float32, as they are in a GPU's FP8 unit.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        assert weights.weight_scale is not None
        assert weights.input_scale is not None
        # Every E4M3 value is a half-precision value: 4 bits of significand, exponents -9 … 8.
        bias = None if weights.bias is None else weights.bias.to(dtype)
        scale = (weights.weight_scale * weights.input_scale * WIDENED).to(dtype)
        self.layer = HalfLinear(weights.weight.to(dtype), bias, scale)
        self.input_scale = weights.input_scale

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return self.layer(widen_e4m3(quantize_e4m3(x, self.input_scale)))


class ScaledLinear:
    """FP8 tensor cores with per-tensor scales."""

    def __init__(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> None:
        assert weights.weight_scale is not None
        assert weights.input_scale is not None
        self.weight = weights.weight.to(device)
        self.input_scale = weights.input_scale.to(device)
        self.bias = None if weights.bias is None else weights.bias.to(device, dtype)
        self.dtype = dtype
        self.scale = scale = weights.weight_scale.to(device)
        # Rows with scales of their own (fused layers that were quantised apart) are scaled after the product.
        self.tensor_scale = scale if scale.numel() == 1 else torch.ones((), device=device)
        self.row_scale = None if scale.numel() == 1 else scale.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        y = self.product(quantize_e4m3(x.reshape(-1, x.shape[-1]), self.input_scale))
        return y.view(*x.shape[:-1], -1)

    def product(self, rows: Tensor) -> Tensor:
        """[rows, in] in E4M3, divided by the input scale → [rows, out] in the layer's dtype."""
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
        return y


def input_scale(layer: Linear) -> Tensor | None:
    """What a layer's input is divided by before it is rounded to E4M3; None for a layer that takes it as it is."""
    return layer.input_scale if isinstance(layer, ScaledLinear) else None


def rounded_product(layer: Linear, x: Tensor) -> Tensor:
    """A layer's result for an input that is rounded already, where it takes one: [rows, in] → [rows, out]."""
    return layer.product(x) if isinstance(layer, ScaledLinear) else layer(x)


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


class RowScaledLinear:
    """FP8 tensor cores without calibration: each row of activations has a scale, found as it comes.

    That takes a launch of its own, and another one to apply it: the product that takes a scale for each row reads its
    weights at half the speed. So it is for weights that no calibration has seen, a drafter's, whose errors cost
    accepted drafts and no wrong token.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rounds a weight [out, in] in bfloat16 or float32 on a GPU; both sizes are multiples of 16."""
        from fourfold.modeling.kernels import round_rows  # Triton is there where a GPU is

        self.round_rows = round_rows
        self.scale = (weight.abs().max().float() / E4M3_MAX).clamp_(min=1e-12)
        self.weight = quantize_e4m3(weight.float(), self.scale)
        self.bias = bias
        self._one = torch.ones((), device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] → [..., out]."""
        rows, scales = self.round_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(rows, self.weight.t(), scale_a=self._one, scale_b=self.scale, out_dtype=torch.bfloat16)
        y = y.mul_(scales) if self.bias is None else torch.addcmul(self.bias, y, scales)
        return y.view(*x.shape[:-1], -1)


class Fp8Head:
    """An output matrix in FP8 on a GPU: a scale for each token's row of weights, and one for each row of activations.

    A row's largest weight is exact then, and it often meets the largest activation: less is lost than with one scale
    for all (docs/performance.md).
    """

    def __init__(self, weight: Tensor) -> None:
        """Rounds a bfloat16 weight [out, in]; both sizes are multiples of 16."""
        from fourfold.modeling import split_product  # Triton is there where a GPU is

        self._few, self._product = split_product.MAX_ROWS, split_product.scaled_product
        self.scale = weight.abs().amax(1).clamp_(min=1e-12)
        self.layer = RowScaledLinear(weight.float() / self.scale.float()[:, None], None)
        self._scale = self.scale.float() * self.layer.scale

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in] → [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > self._few:
            return self.layer(x).mul_(self.scale)
        values, scales = self.layer.round_rows(rows)
        return self._product(values, self.layer.weight, self._scale, scales, x.dtype).view(*x.shape[:-1], -1)


class EmulatedFp8Head:
    """What Fp8Head computes, on a CPU: E4M3 operands, sums in float32, scales applied to them."""

    def __init__(self, weight: Tensor) -> None:
        """Rounds a float32 weight [out, in]."""
        scale = (weight.abs().amax(1) / E4M3_MAX).clamp_(min=1e-12)
        self.layer = HalfLinear(quantize_e4m3(weight, scale[:, None]).float(), None, scale * WIDENED)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        # Powers of two, as `kernels.round_row` takes them; a row of zeros has no range, and any scale will do.
        scales = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_(min=1e-30).log2_().ceil_().exp2_()
        return self.layer(widen_e4m3(quantize_e4m3(x, scales))) * scales


def round_lm_head(weight: Tensor) -> Linear:
    """An output matrix [out, in] in FP8: bfloat16 on a GPU, float32 on a CPU.

    Raises FourfoldError for another dtype.
    """
    on_gpu = weight.device.type == "cuda"
    if weight.dtype != (torch.bfloat16 if on_gpu else torch.float32):
        raise FourfoldError(f"fp8_lm_head: activations in {weight.dtype} cannot be had in FP8 here; set it to false")
    return Fp8Head(weight) if on_gpu else EmulatedFp8Head(weight)
