"""What ended requests left in the cache is used again, and changes no token."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_reference, small_engine, tiny_reference, tiny_tokenizer

from fourfold.config.quantize import QuantizeSettings
from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.engine.prefixes import Prefixes, common_length
from fourfold.quantize.fp8 import quantize_fp8

VOCABULARY = 8
PLANS = {
    "plain": None,
    "one beam": DraftPlan.fixed(1, 4),
    "by load": DraftPlan({1: DraftShape(4, 4), 2: DraftShape(2, 3), 3: NO_DRAFTS}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with few tokens, so that drafts are often right, in bf16 and FP8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_reference(tiny_reference(vocab_size=VOCABULARY), folder / "bf16")
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder / "bf16")
    (folder / "fp8").mkdir()
    texts = [" ".join(f"w{1 + (a * b) % 7}" for b in range(1, 40)) for a in range(1, 9)]
    quantize_fp8(folder / "bf16", texts, QuantizeSettings(max_length=64), folder / "fp8", torch.device("cpu"))
    return folder


def make_engine(checkpoint: Path, plan: DraftPlan | None, caching: bool, max_num_seqs: int = 4) -> LLMEngine:
    options = {"max_num_seqs": max_num_seqs, "max_model_len": 320, "enable_prefix_caching": caching}
    return small_engine(checkpoint, VOCABULARY, plan, **options)


def rounds(engine: LLMEngine, conversations: int, turns: int = 4) -> list[list[RequestOutput]]:
    """Generations that pause and come back with a tool's output behind them, several at once, greedy and sampled."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, VOCABULARY, (20 + 9 * i,), generator=generator).tolist() for i in range(conversations)]
    found = []
    for turn in range(turns):
        params = [
            SamplingParams(
                max_tokens=8 + 5 * (i % 3),
                temperature=(0.0, 0.9)[i % 2],
                seed=10 * turn + i,
                stop=("w5w", "w2w6")[: i % 3],
                ignore_eos=i % 4 > 0,
            )
            for i in range(conversations)
        ]
        found.append(engine.generate(prompts, params))
        output = torch.randint(1, VOCABULARY, (6 + turn,), generator=generator).tolist()
        prompts = [[*o.prompt_token_ids, *o.token_ids, *output] for o in found[-1]]
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("plan", list(PLANS))
def test_tokens_are_the_same_with_and_without(checkpoints: Path, precision: str, plan: str) -> None:
    cached = make_engine(checkpoints / precision, PLANS[plan], True)
    # The second time there are more generations than slots: some find their slot taken.
    for conversations in (4, 7):
        fresh = make_engine(checkpoints / precision, PLANS[plan], False)
        for a, b in zip(rounds(fresh, conversations), rounds(cached, conversations), strict=True):
            assert [(x.token_ids, x.text) for x in a] == [(x.token_ids, x.text) for x in b]
            assert all(x.num_cached_tokens == 0 for x in a)


def test_a_generation_that_goes_on_reads_only_what_is_new(checkpoints: Path) -> None:
    for plan in PLANS.values():
        for turn in rounds(make_engine(checkpoints / "bf16", plan, True, max_num_seqs=8), 4)[1:]:
            for output in turn:
                assert 0 < len(output.prompt_token_ids) - output.num_cached_tokens <= 12


def test_a_generation_that_pauses_beside_others_finds_what_it_had(checkpoints: Path) -> None:
    """All slots are in use but the one that it left."""
    engine = make_engine(checkpoints / "bf16", PLANS["one beam"], True)
    for i in range(3):
        engine.add_request([1 + i] * 12, SamplingParams(max_tokens=300, ignore_eos=True))
    prompt = [5, 6, 7] * 8
    for turn in range(4):
        name = engine.add_request(prompt, SamplingParams(max_tokens=7, ignore_eos=True))
        ended: list[RequestOutput] = []
        while not ended:
            ended = [o for o in engine.step() if o.request_id == name and o.finish_reason]
        assert engine.num_running == 3
        assert ended[0].num_cached_tokens == (len(prompt) - 4 if turn else 0)
        prompt = [*prompt, *ended[0].token_ids, 2, 3, 4]


def test_one_slot_is_enough_for_one_generation(checkpoints: Path) -> None:
    for turn in rounds(make_engine(checkpoints / "bf16", PLANS["by load"], True, max_num_seqs=1), 1)[1:]:
        assert turn[0].num_cached_tokens > 20


def test_what_another_request_needs_is_given_up(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "bf16", None, True, max_num_seqs=2)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = [[1 + i] * 30 for i in range(6)]
    engine.generate(prompts, [params] * 6)
    again = engine.generate(prompts, [params] * 6)
    assert engine.generate([prompts[5]], [params])[0].num_cached_tokens == 29
    assert sum(output.num_cached_tokens > 0 for output in again) < 6


def test_a_request_for_probabilities_reads_its_whole_prompt(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "bf16", None, True)
    prompt = [1, 2, 3, 4, 5] * 4
    first, second = (engine.generate([prompt], [SamplingParams(max_tokens=3, prompt_logprobs=1)])[0] for _ in range(2))
    assert second.num_cached_tokens == 0
    assert second.prompt_logprobs == first.prompt_logprobs
    assert len(second.prompt_logprobs) == len(prompt)


def test_a_cancelled_request_leaves_what_it_had(checkpoints: Path) -> None:
    engine, fresh = (make_engine(checkpoints / "fp8", PLANS["one beam"], caching) for caching in (True, False))
    prompt = [3, 1, 4, 1, 5] * 6
    name = engine.add_request(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(6):
        (output,) = engine.step()
    engine.cancel(name)
    longer = [*prompt, *output.token_ids, 2, 7]
    (a,), (b,) = (e.generate([longer], [SamplingParams(max_tokens=20, ignore_eos=True)]) for e in (engine, fresh))
    assert a.num_cached_tokens == len(longer) - 3
    assert a.token_ids == b.token_ids


@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=20),
    used=st.lists(st.integers(0, 4), min_size=20, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_a_slot_that_is_found_holds_the_tokens(prompts: list[list[int]], used: list[int]) -> None:
    """Against memory that is written as the engine would."""
    prefixes, memory = Prefixes(5), {slot: [0] for slot in range(5)}
    for prompt, taken in zip(prompts, used, strict=False):
        slot, length = prefixes.find(prompt)
        assert length < len(prompt)
        assert length == 0 or memory[slot][:length] == prompt[:length]
        prefixes.take(taken)
        for slot in range(taken):
            memory[slot] = [9]
        if taken < 5:
            slot = prefixes.keep(prompt, taken)
            assert slot >= taken
            memory[slot] = prompt
            assert prefixes.find([*prompt, 1]) == (slot, len(prompt)) or common_length(memory[slot], prompt) > 0


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    prefixes = Prefixes(4)
    first, other = prefixes.keep([1, 2], 1), prefixes.keep([5], 1)
    assert prefixes.keep([1, 2, 3], 1) == first
    assert prefixes.find([5, 5]) == (other, 1)
    assert prefixes.find([1, 2, 4]) == (first, 2)
    assert prefixes.find([7]) == (-1, 0)
