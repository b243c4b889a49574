"""The engine on an NVIDIA GPU: agrees with the CPU, in bf16 and in FP8; drafts change no greedy token but near ties."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_reference, tiny_engine, tiny_reference, tiny_tokenizer

from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.linear import LinearWeights, RowScaledLinear, make_linear, round_lm_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def fp8_weights(rows: int, columns: int, scales: int) -> LinearWeights:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    scale = (weight.reshape(scales, -1).abs().amax(1) / 448).repeat_interleave(rows // scales)
    return LinearWeights(
        (weight / scale[:, None]).to(torch.float8_e4m3fn),
        torch.randn(rows, generator=generator).to(torch.bfloat16),
        scale[0].clone() if scales == 1 else scale,
        torch.tensor(0.01),
    )


@pytest.mark.parametrize("scales", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
def test_fp8_on_the_gpu_equals_its_emulation(rows: int, scales: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    weights = fp8_weights(256, 128, scales)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = make_linear(weights, CPU, torch.float32)(x.float())
    got = make_linear(weights, CUDA, torch.bfloat16)(x.cuda()).float().cpu()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("rows", [1, 12, 130])
def test_a_row_scaled_product_is_near_the_plain_one(rows: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(256, *size, generator=generator).bfloat16() for size in ((192,), ()))
    # Rows of very different sizes: each has its own scale.
    x = (torch.randn(rows, 192, generator=generator) * torch.logspace(-3, 3, rows)[:, None]).bfloat16()
    x[0, 0] = 0
    for added in (None, bias):
        layer = RowScaledLinear(weight.cuda(), None if added is None else added.cuda())
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if added is None else added.float())
        error = (layer(x.cuda()).float().cpu() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 0.06, "two roundings to 4 bits of significand"
        assert error.max() > 0.001, "nothing was rounded"
    emulated = round_lm_head(weight.float())(x.float())
    error = (round_lm_head(weight.cuda())(x.cuda()).float().cpu() - emulated).norm(dim=1) / emulated.norm(dim=1)
    assert error.max() < 0.01, "the CPU rounds otherwise"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_agree_with_the_cpu(architecture: str, tmp_path: Path) -> None:
    save_reference(tiny_reference(architecture), tmp_path)
    tokens = torch.randint(0, 320, (2, 60), generator=torch.Generator().manual_seed(1))
    on_cpu, on_gpu = load_transformer(tmp_path, "cpu"), load_transformer(tmp_path, "cuda", torch.float32)
    expected = on_cpu.logits(on_cpu.hidden_states(tokens))
    got = on_gpu.logits(on_gpu.hidden_states(tokens.cuda())).cpu()
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_batched_decoding_equals_the_cpu(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path)
    target = load_transformer(tmp_path, "cuda", torch.float32)
    on_gpu = LLMEngine(target, tiny_tokenizer(), end_token_ids=(0,), max_num_seqs=4, max_model_len=128)
    prompts = [[1 + i, 5, 9 + i] * (1 + i % 5) for i in range(9)]
    params = [SamplingParams(max_tokens=20, temperature=0.5 * (i % 2), seed=i) for i in range(9)]
    expected = engine.generate(prompts, params)
    got = on_gpu.generate(prompts, params)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True))
    assert same >= 8, "float32 on both devices: at most one near tie may fall the other way"


def test_prompts_read_together_equal_those_read_alone(tmp_path: Path) -> None:
    """Float32, with the kernels of a decoding step, against each prompt by itself without them."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "max_num_seqs": 7, "max_model_len": 400}
    alone, together = (tiny_engine(tmp_path, drafter_seed=3, **options) for _ in range(2))
    alone.prefill.max_rows, alone.prefill.with_kernels = 0, False
    assert together.prefill.max_rows == 2048
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 319, (1 + 37 * i % 350,), generator=generator).tolist() for i in range(30)]
    params = [SamplingParams(max_tokens=1 + i % 20, temperature=0.7 * (i % 2), seed=i) for i in range(30)]
    expected, got = alone.generate(prompts, params), together.generate(prompts, params)
    assert sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True)) >= 28
    for engine in (alone, together):
        for prompt in prompts[:7]:
            engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.step()
    torch.testing.assert_close(together._hidden, alone._hidden, rtol=1e-3, atol=1e-3)


def test_the_rest_of_prompts_is_read_together(tmp_path: Path) -> None:
    """Float32; prompts that begin as ended ones did, against a fresh engine that reads each by itself."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "max_num_seqs": 7, "max_model_len": 400}
    alone = tiny_engine(tmp_path, drafter_seed=3, **options)
    together = tiny_engine(tmp_path, drafter_seed=3, enable_prefix_caching=True, **options)
    alone.prefill.max_rows, alone.prefill.with_kernels = 0, False
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(1, 319, (330,), generator=generator).tolist()
    together.generate([first], [SamplingParams(max_tokens=1)])
    prompts = [[*first[: 330 - 40 * i], *range(1, 2 + 9 * i)] for i in range(7)]
    for engine in (alone, together):
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.step()
    assert [s.output.num_cached_tokens for s in together._running] == [330 - 40 * i for i in range(7)]
    torch.testing.assert_close(together._hidden, alone._hidden, rtol=1e-3, atol=1e-3)


def test_a_prompt_that_several_ask_for_is_read_once(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "max_model_len": 400}
    engine = tiny_engine(tmp_path, drafter_seed=3, max_num_seqs=7, **options)
    alone = tiny_engine(tmp_path, drafter_seed=3, max_num_seqs=1, **options)
    prompts = [[1 + n, 5, 9] * n for n in (20, 20, 90, 20, 90, 90, 4)]
    params = [SamplingParams(max_tokens=12, temperature=0.7 * (i % 2), seed=i, ignore_eos=True) for i in range(7)]
    for prompt, param in zip(prompts, params, strict=True):
        engine.add_request(prompt, param)
    assert len(engine.step()) == 7
    for one in engine._running:
        other = next(s for s in engine._running if s.output.prompt_token_ids == one.output.prompt_token_ids)
        assert engine._hidden[one.slot].equal(engine._hidden[other.slot])
    engine.cancel_all()
    expected, got = alone.generate(prompts, params), engine.generate(prompts, params)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True))
    assert same >= 6, "at most one near tie may fall the other way"


def test_drafts_keep_greedy_tokens(tmp_path: Path) -> None:
    drafted = tiny_engine(tmp_path, drafter_seed=1, device="cuda", dtype=torch.float32, shape={"vocab_size": 16})
    plain = tiny_engine(tmp_path, device="cuda", dtype=torch.float32, shape={"vocab_size": 16})
    prompts = [[1 + i % 14, 5, 9] * (1 + i % 5) for i in range(12)]
    params = [SamplingParams(max_tokens=30, ignore_eos=True)] * 12
    expected, got = plain.generate(prompts, params), drafted.generate(prompts, params)
    assert sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True)) >= 11
    assert sum(output.speculation.num_accepted_tokens for output in got) > 0


PLANS = [None, DraftPlan.fixed(1, 4), DraftPlan.fixed(3, 4), DraftPlan.fixed(4, 4, draft_tokens=5)]


@pytest.mark.parametrize(("sampled", "top_p"), [(False, 1.0), (True, 1.0), (True, 0.95)])
@pytest.mark.parametrize("plan", PLANS, ids=["plain", "one beam", "three beams", "a tree"])
def test_captured_steps_equal_eager_ones(plan: DraftPlan | None, sampled: bool, top_p: float, tmp_path: Path) -> None:
    """Float32, more requests than slots, of all lengths: sequences end, move and are admitted between replays."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "shape": {"vocab_size": 16}}
    options |= {"max_num_seqs": 7, "max_model_len": 200}
    options |= {} if plan is None else {"drafter_seed": 1, "plan": plan}
    eager, captured = tiny_engine(tmp_path, enforce_eager=True, **options), tiny_engine(tmp_path, **options)
    assert (captured.draft_table_bytes > 0) == (plan is not None)
    prompts = [[1 + i % 14, 5, 9] * (1 + 7 * i % 23) for i in range(30)]
    params = [
        SamplingParams(max_tokens=1 + 5 * i % 60, temperature=0.8 * (i % 2) * sampled, top_p=top_p, seed=i, logprobs=1)
        for i in range(30)
    ]
    expected, got = eager.generate(prompts, params), captured.generate(prompts, params)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True))
    assert same >= 28, "at most a near tie or two may fall the other way"
    assert all([p.token for p in output.logprobs] == output.token_ids for output in got)
    if plan is not None:
        assert sum(output.speculation.num_accepted_tokens for output in got) > 0


def test_a_captured_step_runs_for_hundreds_of_steps_beside_cancellations(tmp_path: Path) -> None:
    """Requests cancelled between replays leave the others' tokens as they are alone."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "drafter_seed": 1, "max_model_len": 400}
    engine = tiny_engine(tmp_path, shape={"vocab_size": 16}, **options)
    prompts = [[1 + i, 5, 9] for i in range(8)]
    params = [SamplingParams(max_tokens=300, ignore_eos=True)] * 8
    alone = engine.generate(prompts[:1], params[:1])[0].token_ids
    for prompt, p in zip(prompts, params, strict=True):
        engine.add_request(prompt, p, f"request {prompt[0]}")
    first = engine._waiting[0].output
    for step in range(2000):
        if not engine.has_unfinished:
            break
        engine.step()
        if step % 10 == 9 and engine.num_running > 1:
            engine.cancel(engine._running[-1].output.request_id)
    agreed = next((i for i, (a, b) in enumerate(zip(alone, first.token_ids, strict=False)) if a != b), 300)
    assert first.finish_reason == "length"
    assert agreed >= 100, "float32: a near tie may come, but not soon"
