"""The Triton kernels of a decoding step against their references: on a GPU, or through Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_reference, tiny_reference
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.modeling.attention import grouped_attention, mask_bias
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.decode import decode_forward
from fourfold.modeling.kernels import add_norm, rope_write, silu_mul
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import quantize_e4m3
from fourfold.modeling.norm import RmsNorm
from fourfold.modeling.rope import apply_rope, rope_tables
from fourfold.modeling.split_attention import parts_for, split_attention
from fourfold.modeling.split_product import split_product
from fourfold.modeling.transformer import Transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def chain(starts: list[int], tokens: int) -> Tensor:
    """Positions of new tokens that follow each other."""
    return torch.tensor(starts, device=DEVICE)[:, None] + torch.arange(tokens, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "parts"),
    [(4, 2, 16, 1, 1), (10, 2, 64, 4, 4), (9, 3, 64, 8, 2), (5, 1, 80, 3, None)],
)
def test_split_attention(heads: int, kv_heads: int, dim: int, tokens: int, parts: int | None, dtype: Any) -> None:
    """Lengths of every kind: a first token, both sides of a block's border, the last place; parts without keys."""
    length = 192
    positions = chain([0, 60, 63, 64, 100, length - tokens], tokens)
    batch = len(positions)
    query = randn(batch, tokens, heads + 2 * kv_heads, dim, dtype=dtype)[:, :, :heads]
    cache = randn(batch + 1, 2 * kv_heads, length, dim, dtype=dtype)
    # Places that nobody may look at must not matter, whatever they hold.
    for row, last in enumerate(positions[:, -1].tolist()):
        cache[row, :, last + 1 :] = 1e4
    got = split_attention(query, cache, positions, parts=parts)
    keys, values = cache[:batch].float().chunk(2, 1)
    bias = mask_bias(positions, length, heads // kv_heads, torch.float32)
    expected = grouped_attention(query.float().contiguous(), keys, values, bias)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


def test_parts_fill_the_gpu_and_no_more() -> None:
    assert [parts_for(batch, 8, 2304) for batch in (1, 12, 32, 64)] == [64, 4, 2, 1]
    assert parts_for(1, 8, 100) == 2


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_add_norm(delta: bool, dtype: Any) -> None:
    x, weight = randn(5, 576, dtype=dtype) * 3, randn(576, dtype=dtype)
    added = randn(3, 5, 576) if delta else None
    total = x if added is None else x + added.sum(0).to(dtype)
    expected = RmsNorm(weight, 1e-5)(total)
    got = add_norm(x, added, weight, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter loses the carry of a rounding to E4M3")
def test_results_are_rounded_to_e4m3() -> None:
    """Saturated, where a value is out of range; a rounding may fall to the other side of a near tie."""
    scale = torch.tensor(0.004, device=DEVICE)
    x, weight, gate_up = randn(4, 96), randn(96), randn(1, 4, 2 * 1100)
    cases = [
        (add_norm(x.clone(), None, weight, 1e-5, scale), RmsNorm(weight, 1e-5)(x)),
        (silu_mul(gate_up, torch.float32, scale), silu_mul(gate_up, torch.float32)),
    ]
    for got, exact in cases:
        assert got.dtype == torch.float8_e4m3fn
        expected = quantize_e4m3(exact, scale).float()
        assert expected.abs().max() == 448
        different = got.float() != expected
        assert different.float().mean() < 0.01
        torch.testing.assert_close(got.float(), expected, rtol=0.13, atol=2**-9)


def test_silu_mul() -> None:
    partial = randn(2, 3, 2 * 1100)
    gate, up = partial.sum(0).chunk(2, -1)
    torch.testing.assert_close(silu_mul(partial, torch.float32), torch.nn.functional.silu(gate) * up)


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


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter multiplies no FP8 values")
@pytest.mark.parametrize("rows", [1, 12, 48])
def test_split_product_in_fp8(rows: int) -> None:
    """The tensor cores' short accumulator costs less than what the result is rounded to."""
    x, weight = (randn(*size).to(torch.float8_e4m3fn) for size in ((rows, 5120), (7168, 5120)))
    exact = x.double() @ weight.double().T
    got = split_product(x, weight).double().sum(0)
    assert (got - exact).abs().max() < exact.abs().max() * 2**-9


def test_rope_write(tmp_path: Path) -> None:
    target = load(tmp_path, "llama")
    config = target.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = chain([0, 7, 120], 3)
    partial = randn(2, 9, (heads + 2 * kv_heads) * dim)
    qkv = partial.sum(0).view(3, 3, heads + 2 * kv_heads, dim)
    expected = KVCache.allocate(config, 4, 128, DEVICE, torch.float32)
    got = KVCache.allocate(config, 4, 128, DEVICE, torch.float32)
    cos, sin = rope_tables(config, 128, DEVICE)
    rotated = apply_rope(qkv[:, :, :-kv_heads], cos[positions][:, :, None], sin[positions][:, :, None])
    keys_values = torch.cat((rotated[:, :, heads:], qkv[:, :, -kv_heads:]), 2)
    few = expected.slots(0, 3)
    few.write(1, few.rows(positions), keys_values)
    query = rope_write(partial, (cos, sin), positions, got.data[1], torch.float32)
    torch.testing.assert_close(got.data, expected.data)
    torch.testing.assert_close(query, rotated[:, :, :heads].contiguous())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_whole_forward(architecture: str, tokens: int, tmp_path: Path) -> None:
    """The same hidden states and the same cache as the reference forward, after prompts of different lengths."""
    target = load(tmp_path, architecture)
    lengths = [5, 70, 64]
    caches = [KVCache.allocate(target.config, 3, 128, DEVICE, torch.float32) for _ in range(2)]
    for cache in caches:
        for slot, length in enumerate(lengths):
            prompt = torch.arange(length, device=DEVICE)[None] % 300
            target.forward(prompt, torch.arange(length, device=DEVICE)[None], cache.slots(slot, slot + 1), length)
    new = torch.arange(3 * tokens, device=DEVICE).view(3, tokens) + 17
    positions = chain(lengths, tokens)
    expected = target.forward(new, positions, caches[0], max(lengths) + tokens)
    got = decode_forward(target, new, positions, caches[1])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1].data, caches[0].data, rtol=1e-4, atol=1e-4)


def load(path: Path, architecture: str) -> Transformer:
    return load_transformer(save_reference(tiny_reference(architecture), path), str(DEVICE), torch.float32)
