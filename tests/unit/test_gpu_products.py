"""The products of a decoding step against float64 and against each other: on a GPU, or through Triton's interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from kernel_inputs import DEVICE, HALF, randn

from fourfold.modeling.kernels import silu_mul
from fourfold.modeling.split_product import gated_product, multiplies_gates, scaled_product, split_product


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("rows", "inputs", "columns"), [(1, 64, 64), (12, 576, 960), (5, 200, 100), (48, 1536, 128), (2, 64, 26000)]
)
def test_split_product(rows: int, inputs: int, columns: int, dtype: Any) -> None:
    """Inputs and columns that fill their last block, and such that do not; one part and several."""
    x, weight = randn(rows, inputs, dtype=dtype), randn(columns, inputs, dtype=dtype)
    bias, scale, input_scale = randn(columns), randn(columns), torch.tensor(0.5, device=DEVICE)
    exact = x.double() @ weight.double().T
    tolerance = {"rtol": 1e-4, "atol": 1e-3}
    for factor in (scale, scale[0]):
        got = split_product(x, weight, bias, factor, input_scale)
        torch.testing.assert_close(got.double().sum(0), exact * factor.double() * 0.5 + bias.double(), **tolerance)
    torch.testing.assert_close(split_product(x, weight).double().sum(0), exact, **tolerance)


@pytest.mark.parametrize(("rows", "inputs", "columns"), [(1, 256, 192), (12, 200, 100)])
def test_scaled_product_is_whole(rows: int, inputs: int, columns: int) -> None:
    """A scale for each row of either side; the sum is not split, and has the dtype that is asked for."""
    x, weight = randn(rows, inputs, dtype=HALF), randn(columns, inputs, dtype=HALF)
    scale, input_scale = randn(columns), randn(rows, 1)
    exact = (x.double() @ weight.double().T) * scale.double() * input_scale.double()
    got = scaled_product(x, weight, scale, input_scale, torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(scaled_product(x, weight, scale, input_scale, HALF), got.to(HALF))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter multiplies no FP8 values")
@pytest.mark.parametrize("rows", [1, 12, 48])
def test_split_product_in_fp8(rows: int) -> None:
    """The tensor cores' short accumulator costs less than what the result is rounded to."""
    x, weight = (randn(*size).to(torch.float8_e4m3fn) for size in ((rows, 5120), (7168, 5120)))
    exact = x.double() @ weight.double().T
    got = split_product(x, weight).double().sum(0)
    assert (got - exact).abs().max() < exact.abs().max() * 2**-9


@pytest.mark.parametrize("rows", [1, 12, 48])
@pytest.mark.parametrize(("dtype", "inputs"), [(torch.float32, 64), (HALF, 128)])
def test_gated_product_is_the_product_and_then_the_gates(rows: int, dtype: Any, inputs: int) -> None:
    x, weight = randn(rows, inputs, dtype=dtype), randn(2 * 96, inputs, dtype=dtype) / 8
    bias, scale, input_scale = randn(len(weight)), randn(len(weight)), torch.tensor(0.5, device=DEVICE)
    assert multiplies_gates(weight)
    for factor in (scale, scale[0], None):
        expected = silu_mul(split_product(x, weight, bias, factor, input_scale), HALF)
        assert torch.equal(gated_product(x, weight, bias, factor, input_scale, HALF), expected)
    out_scale = torch.tensor(0.02, device=DEVICE)
    expected = silu_mul(split_product(x, weight), HALF, out_scale)
    assert torch.equal(gated_product(x, weight, None, None, None, HALF, out_scale).float(), expected.float())


def test_small_or_uneven_products_are_gated_apart() -> None:
    assert not multiplies_gates(randn(3072, 640))
    assert not multiplies_gates(randn(96, 64))
    assert not multiplies_gates(randn(192, 100))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter multiplies no FP8 values")
@pytest.mark.parametrize("rows", [1, 12, 48])
def test_gated_product_in_fp8(rows: int) -> None:
    """A 14B model's: the same numbers as in two launches."""
    x, weight = (randn(*size).to(torch.float8_e4m3fn) for size in ((rows, 5120), (27648, 5120)))
    scale, out_scale = torch.tensor(0.01, device=DEVICE), torch.tensor(0.05, device=DEVICE)
    assert multiplies_gates(weight)
    expected = silu_mul(split_product(x, weight, None, scale), HALF, out_scale)
    got = gated_product(x, weight, None, scale, None, HALF, out_scale)
    assert torch.equal(got.float(), expected.float())
