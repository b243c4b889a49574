"""The engine: tokens agree with transformers, batching changes nothing, requests end where they should."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_engine, tiny_reference

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.errors import FourfoldError


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, 320, (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator).tolist()
        for _ in range(count)
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_greedy_tokens_equal_transformers(architecture: str, tmp_path: Path) -> None:
    reference = tiny_reference(architecture)
    engine = tiny_engine(tmp_path, architecture)
    for prompt in prompts(6):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=25, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        (output,) = engine.generate([prompt], [SamplingParams(max_tokens=25)])
        assert output.token_ids == expected[0, len(prompt) :].tolist()


def test_results_do_not_depend_on_the_batch(engine: LLMEngine) -> None:
    """20 requests of all kinds through 8 slots, joining and leaving: the same as one by one, to the token."""
    wanted = prompts(20)
    params = [
        SamplingParams(max_tokens=5 + 3 * (i % 7), temperature=(0.0, 0.8, 1.3)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i)
        for i in range(20)
    ]
    together = engine.generate(wanted, params)
    for prompt, p, output in zip(wanted, params, together, strict=True):
        (alone,) = engine.generate([prompt], [p])
        assert alone.token_ids == output.token_ids
        assert alone.text == output.text


def test_seeds_matter_and_repeat(engine: LLMEngine) -> None:
    prompt = prompts(1)[0]

    def tokens(seed: int) -> list[int]:
        return engine.generate([prompt], [SamplingParams(max_tokens=20, temperature=1.0, seed=seed)])[0].token_ids

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 2, -1, 2**63)}) == 5


def test_end_of_text_and_stop_tokens(engine: LLMEngine) -> None:
    prompt = prompts(1, seed=5)[0]
    (free,) = engine.generate([prompt], [SamplingParams(max_tokens=30, ignore_eos=True)])
    token = free.token_ids[10]
    first = free.token_ids.index(token)
    (stopped,) = engine.generate([prompt], [SamplingParams(max_tokens=30, stop_token_ids=(token,))])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 30


def test_stop_strings_cut_the_text_before_them(engine: LLMEngine) -> None:
    prompt = prompts(1, seed=5)[0]
    (free,) = engine.generate([prompt], [SamplingParams(max_tokens=30, ignore_eos=True)])
    # Across a token's border: the end of one word and the start of the next.
    stop = free.text[14:19]
    (stopped,) = engine.generate([prompt], [SamplingParams(max_tokens=30, stop=("never", stop), ignore_eos=True)])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_streaming_shows_the_text_as_it_grows(engine: LLMEngine) -> None:
    seen: dict[str, list[str]] = {}
    finished = []

    def watch(output: RequestOutput) -> None:
        seen.setdefault(output.request_id, []).append(output.text)

    params = [SamplingParams(max_tokens=12, ignore_eos=True)] * 3
    outputs = engine.generate(prompts(3), params, on_output=watch, on_finish=finished.append)
    assert sorted(o.request_id for o in finished) == sorted(o.request_id for o in outputs)
    for output in outputs:
        texts = seen[output.request_id]
        assert texts[-1] == output.text
        assert len(texts) == 12
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert output.scheduled_time is not None
        assert output.first_token_time is not None
        assert output.finished_time is not None
        assert output.arrival_time <= output.scheduled_time <= output.first_token_time < output.finished_time


def test_cancelled_requests_free_their_slots_and_leave_others_alone(engine: LLMEngine) -> None:
    wanted = prompts(12, seed=9)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = [engine.generate([prompt], [params])[0].token_ids for prompt in wanted]
    outputs = {}
    for i, prompt in enumerate(wanted):
        engine.add_request(prompt, params, f"r{i}")
    for step in range(200):
        for output in engine.step():
            outputs[output.request_id] = output
        if step == 5:
            assert engine.num_running == 8
            assert engine.num_waiting == 4
            assert [engine.cancel(name) for name in ("r0", "r3", "r7", "r9", "r3", "unknown")] == [True] * 4 + [
                False
            ] * 2
            assert engine.num_running == 5
        if not engine.has_unfinished:
            break
    assert not engine.has_unfinished
    assert outputs["r0"].finish_reason == "cancelled"
    assert "r9" not in outputs, "a request that was cancelled while it waited has run"
    for i in {*range(12)} - {0, 3, 7, 9}:
        assert outputs[f"r{i}"].token_ids == alone[i], i


@given(lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=14))
@settings(max_examples=15, deadline=None)
def test_all_requests_end_with_the_length_they_asked_for(engine: LLMEngine, lengths: list[tuple[int, int]]) -> None:
    outputs = engine.generate(
        [[7] * prompt for prompt, _ in lengths], [SamplingParams(max_tokens=n, ignore_eos=True) for _, n in lengths]
    )
    assert [len(output.token_ids) for output in outputs] == [n for _, n in lengths]
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([320], {}, "outside 0 … 319"),
        ([-1], {}, "outside 0 … 319"),
        ([1] * 100, {"max_tokens": 29}, r"100 prompt tokens \+ 29 max_tokens = 129, more than max_model_len 128"),
    ],
)
def test_impossible_requests_are_refused(engine: LLMEngine, prompt: list[int], params: dict, message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"stop": ("",)},
    ],
)
def test_sampling_parameters_have_ranges(values: dict) -> None:
    with pytest.raises(FourfoldError, match=next(iter(values))):
        SamplingParams(**values)


def test_a_cache_that_does_not_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"1000000000 slots .* x 512 tokens .* x 512 bytes a token = .* GiB"):
        tiny_engine(tmp_path, max_num_seqs=10**9, max_model_len=512)
    with pytest.raises(FourfoldError, match="more than the 512 positions"):
        tiny_engine(tmp_path, max_model_len=513)


def test_a_long_prompt_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tmp_path)
    prompt = prompts(1, seed=3)[0] * 3
    (whole,) = engine.generate([prompt], [SamplingParams(max_tokens=20)])
    monkeypatch.setattr("fourfold.engine.prefill.PREFILL_CHUNK", 7)
    (chunked,) = engine.generate([prompt], [SamplingParams(max_tokens=20)])
    assert chunked.token_ids == whole.token_ids
