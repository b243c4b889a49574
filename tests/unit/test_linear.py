"""Linear layers: exact where they say so, and a row's bits do not depend on its neighbours."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.modeling.linear import (
    E4M3_MAX,
    FEW,
    WIDENED,
    EmulatedFp8Head,
    HalfLinear,
    LinearWeights,
    PackedLinear,
    half_shift,
    make_linear,
    pack_linear,
    pad_rows,
    quantize_e4m3,
    row_block,
    widen_e4m3,
)

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_every_e4m3_value_is_widened_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~values.float().isnan()
    assert finite.sum() == 254
    assert torch.equal(widen_e4m3(values)[finite] * WIDENED, values.float()[finite])
    many = values.repeat(1 + FEW // 256, 1)
    assert torch.equal(widen_e4m3(many)[:, finite] * WIDENED, many.float()[:, finite])


def test_activations_are_rounded_to_nearest_even_and_saturate() -> None:
    x = torch.tensor([0.0, 1.0, 1.0625, 1.1875, 17.0, 19.0, -1e9, 1e9, 2.0**-10, 3 * 2.0**-10])
    expected = torch.tensor([0.0, 1.0, 1.0, 1.25, 16.0, 20.0, -E4M3_MAX, E4M3_MAX, 0.0, 2.0**-8])
    assert torch.equal(quantize_e4m3(x * 0.5, torch.tensor(0.5)).float(), expected)


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_is_the_product_of_rounded_operands_and_scales(per_row: bool) -> None:
    weight = random(48, 64).to(torch.float8_e4m3fn)
    weight_scale = random(48, seed=1).abs() + 0.1 if per_row else torch.tensor(0.37)
    bias, input_scale, x = random(48, seed=2), torch.tensor(0.021), random(7, 64, seed=3)
    layer = make_linear(LinearWeights(weight, bias, weight_scale, input_scale), CPU, torch.float32)
    rounded = (x / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = rounded.double() @ weight.double().t() * (input_scale * weight_scale).double() + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    # Not the same as without rounding: the emulation is no float32 layer in disguise.
    plain = x.double() @ (weight.double() * weight_scale.double().reshape(-1, 1)).t() + bias.double()
    assert (expected - plain).abs().max() > 1e-2


@given(rows=st.integers(1, 70), extra=st.integers(0, 30), exponent=st.integers(-20, 12))
@settings(max_examples=40, deadline=None)
def test_a_row_has_the_same_bits_in_any_batch(rows: int, extra: int, exponent: int) -> None:
    weight = random(96, 64, scale=2.0**exponent).bfloat16().float()
    x = random(rows + extra, 64, seed=rows)
    int8 = make_linear(int8_weights(96, 64, random(96, seed=5)), CPU, torch.float32)
    for layer in (pack_linear(weight, random(96, seed=5)), PackedLinear(weight, None), int8):
        together = layer(x)
        assert torch.equal(layer(x[:rows]), together[:rows])
        assert torch.equal(layer(x[rows - 1]), together[rows - 1])
        assert torch.equal(layer(x[None, :rows])[0], together[:rows])


@given(exponent=st.integers(-60, 40))
@settings(max_examples=30, deadline=None)
def test_bfloat16_weights_lose_nothing_in_half_precision(exponent: int) -> None:
    weight = random(40, 64, seed=exponent + 60, scale=2.0**exponent).bfloat16().float()
    x = random(5, 64, seed=1)
    layer = pack_linear(weight)
    assert isinstance(layer, HalfLinear)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=2.0**exponent * 1e-4)


def test_weights_that_half_precision_cannot_hold_stay_float32() -> None:
    precise = random(8, 64)
    assert half_shift(precise) is None
    assert isinstance(pack_linear(precise), PackedLinear)
    torch.testing.assert_close(pack_linear(precise)(precise), F.linear(precise, precise))
    assert half_shift(torch.tensor([[float("nan"), 1.0]])) is None
    assert half_shift(torch.zeros(2, 2)) == 0


def int8_weights(rows: int, columns: int, bias: torch.Tensor | None = None) -> LinearWeights:
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return LinearWeights(weight, bias, random(rows, seed=1).abs() + 0.01)


def test_int8_weights_are_read_in_half_precision_and_lose_nothing() -> None:
    weights, x = int8_weights(32, 1536, random(32, seed=3)), random(3, 1536, seed=2)
    layer = make_linear(weights, CPU, torch.float32)
    assert isinstance(layer, HalfLinear)
    assert weights.bias is not None
    assert weights.weight_scale is not None
    real = weights.weight.double() * weights.weight_scale.double()[:, None]
    expected = x.double() @ real.t() + weights.bias.double()
    # float32's rounding of the sums, and nothing of half precision's (2^-11) or of int8's (2^-8).
    assert (layer(x).double() - expected).abs().max() < 2e-6 * expected.abs().max()


def test_rows_are_padded_to_the_block_of_this_processor() -> None:
    block = row_block()
    assert pad_rows(torch.ones(block, 2)).shape == (block, 2)
    padded = pad_rows(torch.ones(block + 1, 2))
    assert padded.shape == (-(-(block + 1) // block) * block, 2)
    assert not padded[block + 1 :].any()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_an_output_matrix_in_fp8_has_scales_for_its_rows_and_for_those_of_its_input(rows: int, seed: int) -> None:
    weight = random(96, 64, seed=seed)
    # Rows of very different sizes, and one of zeros.
    x = random(rows, 64, seed=seed + 1) * torch.logspace(-6, 6, rows)[:, None]
    x[0] = 0
    layer = EmulatedFp8Head(weight)
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    rounded = quantize_e4m3(weight, scale).double() * scale.double()
    got = layer(x)
    for row, result in zip(x, got, strict=True):
        exponent = torch.log2(row.abs().max().double() / E4M3_MAX).ceil() if row.any() else torch.tensor(0.0)
        row_scale = 2.0**exponent
        kept = quantize_e4m3(row, row_scale.float()).double() * row_scale
        sizes = rounded.abs() @ kept.abs()
        assert ((result.double() - rounded @ kept).abs() <= 1e-5 * sizes).all()
    assert not got[0].any()
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(got, alone), "a row's bits depend on its neighbours"
