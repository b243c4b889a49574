"""The forward of prompts with a GPU's kernels against the reference: on a GPU, or through Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_reference, tiny_engine, tiny_reference

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.engine import SamplingParams
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import E4M3_MAX, LinearWeights, ScaledLinear
from fourfold.modeling.prefill import prefill_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSES_CARRY = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="Triton's interpreter loses the carry of a rounding to E4M3"
)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float8_e4m3fn, marks=LOSES_CARRY)], ids=["float32", "fp8"]
)
def test_states_keys_and_values_are_the_reference_s(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Several prompts in slots behind others, and a second part of each."""
    target = load_transformer(save_reference(tiny_reference(architecture), tmp_path), str(DEVICE), torch.float32)
    caches = [KVCache.allocate(target.config, 4, 128, DEVICE, dtype) for _ in range(2)]
    tokens = torch.randint(1, 320, (2, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.arange(70, device=DEVICE).repeat(2, 1)
    for part in (slice(0, 48), slice(48, 70)):
        arguments = tokens[:, part], positions[:, part].contiguous()
        expected = target.forward(*arguments, caches[0].slots(1, 3), part.stop)
        got = prefill_forward(target, *arguments, caches[1].slots(1, 3), part.stop)
        # Where a cache is in FP8, a value on the border may be rounded to either side, and is attended to.
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert not caches[1].raw[:, 0].any()
    assert not caches[1].raw[:, :, :, 70:].any()
    ours, theirs = (cache.data.float() for cache in reversed(caches))
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 0.13, atol=1e-2)


@LOSES_CARRY
@pytest.mark.parametrize("row_scales", [False, True], ids=["one scale", "a scale a row"])
def test_layers_in_fp8_take_what_the_kernels_round(row_scales: bool, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    target = load_transformer(save_reference(tiny_reference(), tmp_path), str(DEVICE), torch.float32)
    generator = torch.Generator().manual_seed(0)

    def random_layer(outputs: int, inputs: int) -> ScaledLinear:
        weight = (torch.randn(outputs, inputs, generator=generator) * 60).clamp(-E4M3_MAX, E4M3_MAX)
        scale = torch.rand(outputs if row_scales else 1, generator=generator) * 0.005
        weights = LinearWeights(weight.to(torch.float8_e4m3fn), None, scale.view(-1) if row_scales else scale[0])
        weights.input_scale = torch.tensor(0.02)
        return ScaledLinear(weights, DEVICE, torch.float32)

    for layer in target.layers:
        layer.qkv, layer.o = random_layer(128, 64), random_layer(64, 64)
        layer.gate_up, layer.down = random_layer(192, 64), random_layer(64, 96)
    tokens = torch.randint(1, 320, (2, 40), generator=generator).to(DEVICE)
    positions = torch.arange(40, device=DEVICE).repeat(2, 1)
    caches = [KVCache.allocate(target.config, 2, 64, DEVICE, torch.float32) for _ in range(2)]
    expected = target.forward(tokens, positions, caches[0], 40)
    got = prefill_forward(target, tokens, positions, caches[1], 40)
    # A few numbers on a border of E4M3 are rounded to its other side.
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert (caches[1].data - caches[0].data).norm() < 0.02 * caches[0].data.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the engine reads prompts so anyway: tests/gpu")
def test_an_engine_that_reads_prompts_so_gives_the_same_tokens(tmp_path: Path) -> None:
    plain, kernels = (tiny_engine(tmp_path, shape={"num_hidden_layers": 1}, drafter_seed=3) for _ in range(2))
    kernels.prefill.max_rows, kernels.prefill.with_kernels = 2048, True
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 320, (n,), generator=generator).tolist() for n in (3, 40, 17, 70, 1, 60)]
    params = [SamplingParams(max_tokens=8, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(6)]
    expected, got = plain.generate(prompts, params), kernels.generate(prompts, params)
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]
