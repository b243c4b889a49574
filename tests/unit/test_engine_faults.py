"""What goes wrong with one request ends that request with an error, and leaves all others as they are alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import run_all, tiny_engine, tiny_tokenizer

from fourfold.config.engine import EngineSettings
from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.engine.memory import GIB, kv_cache_bytes, plan_kv_cache, step_bytes
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.errors import FourfoldError
from fourfold.model.carrier import QWEN2_14B
from fourfold.modeling.transformer import Transformer

BROKEN = 319
"""A token whose embedding holds a NaN; no other prompt has it, and no answer: it is never the most likely."""
PLANS = {"plain": None, "one beam": DraftPlan.fixed(1, 4), "beams": DraftPlan.fixed(3, 3)}
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
PROMPTS = [[5 + i, 9, 30 + i] * (1 + i) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"), drafter_seed=3)


def make(model: LLMEngine, plan: DraftPlan | None = None, **options: Any) -> LLMEngine:
    """An engine over the model that a test may break: its embedding is its own."""
    source = model.target
    target = Transformer(
        source.config,
        source.embedding.clone(),
        source.layers,
        source.norm,
        source.lm_head,
        source.device,
        source.dtype,
    )
    drafter = None if plan is None else model.drafter
    options = {"max_num_seqs": 4, "max_model_len": 128, "plan": plan, **options}
    return LLMEngine(target, tiny_tokenizer(), end_token_ids=(0,), drafter=drafter, **options)


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": True}], ids=["fresh", "prefixes"])
def test_a_nan_ends_the_requests_that_it_reaches(
    model: LLMEngine, plan: DraftPlan | None, options: dict[str, Any]
) -> None:
    expected = [output.token_ids for output in make(model, plan).generate(PROMPTS, [PARAMS] * 6)]
    engine = make(model, plan, max_num_batched_tokens=16, **options)
    engine.target.embedding[BROKEN, 3] = float("nan")
    for again in range(2):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(prompt, PARAMS, f"sound {again} {i}")
            # Broken from the first token on, in the middle, and at the end of a prompt that takes several steps.
            broken = [*prompt, BROKEN, *[4] * (20 * (i % 2)), *([] if i % 3 else [BROKEN])]
            engine.add_request(broken, PARAMS, f"broken {again} {i}")
    outputs = run_all(engine)
    for name, output in outputs.items():
        if name.startswith("broken"):
            assert (output.finish_reason, output.token_ids, output.logprobs) == ("error", [], [])
            assert "the scores of token 1 hold a NaN or an infinity" in str(output.error)
        else:
            assert output.token_ids == expected[int(name.split()[-1])], name
    assert len(outputs) == 24


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_nan_that_comes_with_a_generated_token_ends_that_answer(model: LLMEngine, plan: DraftPlan | None) -> None:
    """With drafts, it may come as a draft too, one step before, and also where it would not have been chosen."""
    expected = make(model, plan).generate(PROMPTS, [PARAMS] * 6)
    engine = make(model, plan)
    # A token that some answers have and others have not.
    token = next(
        t
        for t in expected[0].token_ids[3:-1]
        if 0 < sum(t in o.token_ids for o in expected) < 6 and t not in PROMPTS[0]
    )
    assert not any(token in prompt for prompt in PROMPTS)
    engine.target.embedding[token, 0] = float("inf")
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    outputs = run_all(engine)
    for i, alone in enumerate(expected):
        output = outputs[str(i)]
        ends = alone.token_ids.index(token) + 1 if token in alone.token_ids[:-1] else 12
        assert output.token_ids == alone.token_ids[: len(output.token_ids)]
        assert len(output.logprobs) == len(output.token_ids) <= ends
        if output.finish_reason == "length":
            assert len(output.token_ids) == ends == 12
        else:
            assert f"the scores of token {len(output.token_ids) + 1} hold" in str(output.error)
            assert plan is not None or len(output.token_ids) == ends < 12
    assert len({output.finish_reason for output in outputs.values()}) == 2


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_nan_does_not_reach_the_shorter_answer_that_takes_its_slot(model: LLMEngine, plan: DraftPlan | None) -> None:
    engine = make(model, plan)
    long, short = [7, 8] * 24, [6, 3]
    (alone,) = engine.generate([short], [PARAMS])
    for name, prompt in (("long", long), ("short", short)):
        engine.add_request(prompt, PARAMS, name)
    outputs = {output.request_id: output for output in [*engine.step(), *engine.step()]}
    broken = outputs["long"].token_ids[-1]
    assert broken not in alone.token_ids
    engine.target.embedding[broken] = float("nan")
    outputs |= run_all(engine)
    assert outputs["long"].finish_reason == "error"
    assert outputs["short"].token_ids == alone.token_ids


def test_choosing_tells_of_scores_that_are_not_finite() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    scores[1, 7], scores[2, 49], scores[3, 5] = float("nan"), float("nan"), float("inf")
    scores[4, :49] = float("-inf")
    params = [SamplingParams(temperature=0.7 * (i % 2), top_p=0.9, seed=i) for i in range(6)]
    for rows in (params, [SamplingParams()] * 6):
        batch = SamplingBatch.of(rows, torch.device("cpu"))
        chosen = choose(scores, batch, torch.zeros(6, dtype=torch.int64)).tolist()
        # An infinity is the most likely token where none is drawn.
        assert chosen[1:5] == [-1, -1, -1 if rows is params else 5, 49]
        assert min(chosen[0], chosen[5]) >= 0


def raising(times: list[int], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but that these of its calls find no memory, as PyTorch's allocator says it."""
    calls = iter(range(10**9))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) in times:
            torch.empty(2**60, dtype=torch.uint8)  # no machine has that much
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("where", ["logits", "forward"])
def test_a_step_without_memory_ends_the_request_that_came_last(
    model: LLMEngine, plan: DraftPlan | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [output.token_ids for output in make(model, plan).generate(PROMPTS, [PARAMS] * 6)]
    engine = make(model, plan)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    engine.step()
    engine.step()
    monkeypatch.setattr(engine.target, where, raising([0], getattr(engine.target, where)))
    outputs = run_all(engine)
    assert outputs["3"].finish_reason == "error"
    assert "out of memory while 4 requests were decoded; lower max_num_seqs" in str(outputs["3"].error)
    for i in (0, 1, 2, 4, 5):
        assert outputs[str(i)].token_ids == expected[i]
        assert [p.token for p in outputs[str(i)].logprobs] == expected[i]


@pytest.mark.parametrize("call", [0, 2])
def test_a_prompt_without_memory_ends_its_request_alone(
    model: LLMEngine, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first part and in a later one."""
    engine = make(model, max_num_batched_tokens=16)
    long = [7, 8] * 30
    expected = [output.token_ids for output in engine.generate([*PROMPTS, long], [PARAMS] * 7)]
    for i, prompt in enumerate(PROMPTS[:3]):
        engine.add_request(prompt, PARAMS, str(i))
    while engine.num_waiting:
        engine.step()
    engine.add_request(long, PARAMS, "long")
    engine.add_request(PROMPTS[3], PARAMS, "3")
    monkeypatch.setattr(engine.prefill, "_compute", raising([call], engine.prefill._compute))
    outputs = run_all(engine)
    assert outputs["long"].finish_reason == "error"
    assert "out of memory while its prompt was read" in str(outputs["long"].error)
    assert [outputs[str(i)].token_ids for i in range(4)] == expected[:4]
    assert engine.generate([long], [PARAMS])[0].token_ids == expected[6]


def test_other_errors_are_not_hidden(model: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(model)
    engine.add_request([5], PARAMS)
    engine.step()
    monkeypatch.setattr(engine.target, "logits", lambda hidden: torch.empty(2)[5])
    with pytest.raises(IndexError):
        engine.step()


def test_generate_names_a_failed_request_once_all_have_ended(model: LLMEngine) -> None:
    engine = make(model)
    engine.target.embedding[BROKEN] = float("nan")
    ended: list[RequestOutput] = []
    with pytest.raises(FourfoldError, match=r"request-1: the scores of token 1 hold a NaN"):
        engine.generate([[5], [BROKEN], [6]], [PARAMS] * 3, on_finish=ended.append)
    assert sorted(str(output.finish_reason) for output in ended) == ["error", "length", "length"]


H200 = int(139.8 * GIB)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """An H200 with so many bytes of weights on it."""

    def fill(weights: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(H200 - weights), H200))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    return fill


def plan_14b(plan: DraftPlan, max_num_seqs: int, length: int, gpu_memory_utilization: float = 0.9) -> int:
    """As the engine plans it, with a slot for prompts in parts and one for prefixes."""
    lanes = plan.lanes(max_num_seqs)
    return plan_kv_cache(
        QWEN2_14B,
        slots=lanes + 2,
        length=length,
        rows=lanes * plan.beam_length,
        chunk=512,
        together=2048,
        aside=512,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        gpu_memory_utilization=gpu_memory_utilization,
    )


@pytest.mark.parametrize("weights", [29.5e9, 15e9], ids=["bf16", "fp8"])
def test_twelve_sequences_of_20k_tokens_fit_an_h200(card: Callable[[float], None], weights: float) -> None:
    card(weights + 0.6e9)  # a drafter beside it
    assert kv_cache_bytes(QWEN2_14B, 1, 1, torch.bfloat16) == 196_608
    # 20,000 tokens and three drafts, in blocks of 64 keys.
    assert plan_14b(DraftPlan.fixed(1, 4), 12, 20032) == 14 * 20032 * 196_608 == 55_138_320_384
    # A step's own numbers are small beside that.
    assert step_bytes(QWEN2_14B, 12 * 4, 512, 20032, 2048) < 1.7e9
    assert plan_14b(DraftPlan.fixed(1, 4), 3, 32064) > 0


def test_what_does_not_fit_an_h200_is_refused_with_what_would(card: Callable[[float], None]) -> None:
    card(29.5e9)
    message = (
        r"KV cache: 38 slots .* x 20032 tokens .* x 196608 bytes a token = 139\.38 GiB, and .* GiB for a step's "
        r"numbers, but 98\.\d\d GiB are free on cuda within gpu_memory_utilization 0\.9; (\d+) slots of that length "
        r"would fit, or (\d+) tokens in each slot"
    )
    with pytest.raises(FourfoldError, match=message) as refused:
        plan_14b(DraftPlan.fixed(3, 4), 12, 20032)
    slots, tokens = (int(word) for word in str(refused.value).split("; ")[1].split() if word.isdigit())
    step = step_bytes(QWEN2_14B, 36 * 4, 512, 20032, 2048) + kv_cache_bytes(QWEN2_14B, 1, 512, torch.bfloat16)
    free = H200 - 29.5e9 - 0.1 * H200
    assert 0 <= free - step - kv_cache_bytes(QWEN2_14B, slots, 20032, torch.bfloat16) < 20032 * 196_608 + 2
    assert 0 <= free - step - kv_cache_bytes(QWEN2_14B, 38, tokens, torch.bfloat16) < 38 * 196_608 + 2
    # Beams by the load need lanes for the widest product only.
    assert plan_14b(DraftPlan({1: DraftPlan.fixed(4, 4).shape(1), 12: DraftPlan.fixed(1, 4).shape(1)}), 12, 20032)


def test_a_slot_for_prompts_in_parts_is_taken_where_one_is_needed(tmp_path: Path) -> None:
    def slots(**options: Any) -> int:
        return tiny_engine(tmp_path, max_model_len=64, **options)._cache.num_slots

    assert slots(max_num_seqs=3) == 3
    assert slots(max_num_seqs=3, max_num_batched_tokens=16) == 4
    assert slots(max_num_seqs=3, max_num_batched_tokens=64) == 3
    assert slots(max_num_seqs=1, max_num_batched_tokens=16) == 1
    assert EngineSettings(precision="bf16").max_num_batched_tokens == 512
