"""The cache of keys and values, in the model's dtype and in E4M3."""

import pytest
import torch
from tiny_models import save_reference, tiny_drafter, tiny_reference, tiny_tokenizer

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.transformer import Transformer

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_transformer(save_reference(tiny_reference(), tmp_path_factory.mktemp("model")), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_what_is_written_is_read(target: Transformer, dtype: torch.dtype) -> None:
    """At the places of the new tokens and nowhere else; too large for E4M3 is its largest, never NaN."""
    cache = KVCache.allocate(target.config, 3, 100, CPU, dtype)
    heads, dim = 2 * target.config.num_key_value_heads, target.config.head_dim
    values = torch.randn(2, 3, heads, dim, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0, :2] = torch.tensor([1e4, -1e4])
    positions = torch.tensor([[0, 1, 2], [40, 41, 42]])
    few = cache.slots(0, 2)
    few.write(1, few.rows(positions), values)
    expected = torch.zeros_like(cache.data, dtype=torch.float32)
    for row, places in enumerate(positions):
        expected[1, row, :, places] = values[row].transpose(0, 1)
    if dtype == FP8:
        expected = expected.clamp(-448, 448).to(FP8).float()
    assert torch.equal(cache.data.float(), expected)
    cache.move(1, 2, 50)
    assert torch.equal(cache.data[:, 2, :, :50].float(), expected[:, 1, :, :50])
    keys, read = few.read(1, 64)
    assert torch.equal(torch.cat((keys, read), 1).float(), expected[1, :2, :, :64])


@pytest.mark.parametrize("dim", [4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_slots_move_and_are_copied_in_any_width(dim: int, dtype: torch.dtype) -> None:
    """Copied as the widest numbers that a row is a whole number of."""
    data = torch.randn(2, 3, 2, 9, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache, other = KVCache(data.clone()), KVCache(torch.zeros(2, 1, 2, 7, dim).to(dtype))
    cache.move(2, 0, 6)
    other.copy(cache.slots(1, 2), 5)
    expected = data.float()
    expected[:, 0, :, :6] = expected[:, 2, :, :6]
    assert torch.equal(cache.data.float(), expected)
    assert torch.equal(other.data[:, 0, :, :5].float(), expected[:, 1, :, :5])
    assert not other.data[:, :, :, 5:].float().any()


def answers(target: Transformer, dtype: torch.dtype | None, plan: DraftPlan | None = None) -> list[RequestOutput]:
    engine = LLMEngine(
        target,
        tiny_tokenizer(),
        end_token_ids=(0,),
        drafter=None if plan is None else tiny_drafter(target, seed=1),
        plan=plan,
        kv_cache_dtype=dtype,
        max_num_seqs=3,
        max_model_len=200,
    )
    prompts = [[(i * 37 + k * k) % 319 + 1 for k in range(20 + 30 * i)] for i in range(5)]
    params = [SamplingParams(max_tokens=40, temperature=(0.0, 0.7)[i % 2], seed=i, ignore_eos=True) for i in range(5)]
    return engine.generate(prompts, params)


@pytest.mark.parametrize("plan", [DraftPlan.fixed(1, 4), DraftPlan.fixed(3, 3)], ids=str)
def test_drafts_change_no_token_with_an_fp8_cache(target: Transformer, plan: DraftPlan) -> None:
    plain, drafted = answers(target, FP8), answers(target, FP8, plan)
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
    assert any(output.speculation.num_draft_tokens for output in drafted)


def test_an_fp8_cache_is_near_the_exact_one_and_a_quarter_of_its_size(target: Transformer) -> None:
    prompt = torch.arange(1, 91)[None]
    states, sizes = [], []
    for dtype in (torch.float32, FP8):
        cache = KVCache.allocate(target.config, 1, 128, CPU, dtype)
        states.append(target.forward(prompt, torch.arange(90)[None], cache, 90)[0, -1])
        sizes.append(cache.data.nbytes)
    exact, rounded = states
    assert sizes[0] == 4 * sizes[1]
    assert not torch.equal(exact, rounded)
    # Random weights enlarge the rounding, which is 2 to 3 % of each value.
    assert (rounded - exact).norm() < 0.2 * exact.norm()
