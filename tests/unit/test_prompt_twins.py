"""Several answers to one prompt: it is read once, and each answer is as if it had been read for it alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_faults import raising
from test_prefill_together import PARAMS, PLANS, ROWS, Watched, engine_like, prompts_of
from tiny_models import run_all, tiny_engine

from fourfold.engine import LLMEngine, SamplingParams

A, B = prompts_of([20, 31])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"), drafter_seed=3)


def params_of(count: int) -> list[SamplingParams]:
    """Greedy and sampled ones, some of a single token."""
    return [
        SamplingParams(max_tokens=(7, 1, 4)[i % 3], temperature=0.9 * (i % 2), seed=i, logprobs=0) for i in range(count)
    ]


@given(
    prompts=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 4)), min_size=1, max_size=5),
    order=st.none() | st.randoms(use_true_random=False),
    rows=st.sampled_from([0, 256, ROWS]),
    most=st.sampled_from([None, 50]),
    prefixes=st.booleans(),
    plan=st.sampled_from(list(PLANS)),
)
@settings(max_examples=30, deadline=None)
def test_tokens_are_those_of_prompts_read_alone(
    base: LLMEngine,
    prompts: list[tuple[int, int]],
    order: Any,
    rows: int,
    most: int | None,
    prefixes: bool,
    plan: str,
) -> None:
    pairs = zip(prompts_of([tokens for tokens, _ in prompts]), prompts, strict=True)
    asked = [prompt for prompt, (_, times) in pairs for _ in range(times)]
    if order is not None:
        order.shuffle(asked)
    params = params_of(len(asked))
    # One slot: nothing else waits that could have one.
    expected = engine_like(base, 0, PLANS[plan], max_num_seqs=1).generate(asked, params)
    engine = engine_like(base, rows, PLANS[plan], max_num_batched_tokens=most, enable_prefix_caching=prefixes)
    for _ in range(2):
        got = engine.generate(asked, params)
        assert [(o.token_ids, o.text, o.finish_reason) for o in got] == [
            (o.token_ids, o.text, o.finish_reason) for o in expected
        ]
        assert [[p.token for p in o.logprobs] for o in got] == [[p.token for p in o.logprobs] for o in expected]
        assert all(o.num_cached_tokens < len(o.prompt_token_ids) for o in got)
        assert prefixes or all(o.num_cached_tokens == 0 for o in got)
        assert all((o.scheduled_time or 0) > o.arrival_time for o in got)


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [(0, [(1, 20), (1, 31), (1, 20)]), (ROWS, [(2, 31)])],
    ids=["each alone", "together"],
)
def test_a_prompt_is_read_once(base: LLMEngine, rows: int, shapes: list[tuple[int, int]]) -> None:
    """Where prompts are read one by one, for requests that follow each other."""
    engine = engine_like(base, rows, max_num_seqs=8)
    watched = Watched(engine)
    for prompt in (A, A, A, B, B, A):
        engine.add_request(prompt, PARAMS)
    assert len(engine.step()) == 6
    assert watched.shapes == shapes
    assert [sequence.slot for sequence in engine._running] == list(range(6))
    for sequence in engine._running:
        prompt = sequence.output.prompt_token_ids
        other = next(s for s in engine._running if s.output.prompt_token_ids == prompt)
        mine, its = (engine._cache.data[:, s.slot, :, : len(prompt)] for s in (sequence, other))
        assert mine.equal(its)
        assert mine.any()
        assert engine._hidden[sequence.slot].equal(engine._hidden[other.slot])


def test_no_more_run_than_may(base: LLMEngine) -> None:
    engine = engine_like(base, max_num_seqs=4)
    watched = Watched(engine)
    for prompt in (A, A, B, B, B, A):
        engine.add_request(prompt, PARAMS)
    assert len(engine.step()) == 4
    assert (engine.num_running, engine.num_waiting) == (4, 2)
    assert watched.shapes == [(2, 31)]
    run_all(engine)


def test_a_prompt_in_parts_is_read_once(base: LLMEngine) -> None:
    prompt = prompts_of([70])[0]
    engine = engine_like(base, max_num_batched_tokens=32)
    watched = Watched(engine)
    names = [engine.add_request(prompt, PARAMS) for _ in range(4)]
    outputs = run_all(engine)
    assert watched.prompts == [(1, 32), (1, 32), (1, 6)]
    expected = engine_like(base, 0, max_num_seqs=1).generate([prompt], [PARAMS])[0].token_ids
    assert [outputs[name].token_ids for name in names] == [expected] * 4


def test_probabilities_of_a_prompt_need_a_reading_of_their_own(base: LLMEngine) -> None:
    engine = engine_like(base)
    watched = Watched(engine)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate([A, A, A, A], [PARAMS, asked, PARAMS, PARAMS])
    assert watched.prompts == [(1, 20), (1, 20)], "the third and the fourth have what the second read"
    assert [len(output.prompt_logprobs) for output in outputs] == [0, 20, 0, 0]
    assert len({tuple(outputs[i].token_ids) for i in (0, 2, 3)}) == 1


@pytest.mark.parametrize("rows", [0, ROWS])
def test_who_has_no_memory_leaves_the_others_theirs(
    base: LLMEngine, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reading fails: the next request with that prompt reads it."""
    engine = engine_like(base, rows)
    calls = iter(range(100))
    failing = {0} if rows == 0 else {0, 1}  # of two prompts that are read together, then of the first
    watched = Watched(engine, lambda tokens: tokens.shape[1] > 1 and next(calls) in failing)
    names = [engine.add_request(prompt, PARAMS) for prompt in (A, A, B, A)]
    outputs = {output.request_id: output for output in engine.step()}
    engine.target.forward = watched._forward  # type: ignore[method-assign]
    outputs |= run_all(engine)
    assert "out of memory while its prompt was read" in str(outputs[names[0]].error)
    alone = engine_like(base, 0, max_num_seqs=1)
    for name, prompt in zip(names[1:], (A, B, A), strict=True):
        assert outputs[name].token_ids == alone.generate([prompt], [PARAMS])[0].token_ids


def test_where_many_scores_have_no_memory_each_is_read(base: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_like(base, 0)
    logits = engine.target.logits

    def hungry(hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) == 3:
            torch.empty(2**60, dtype=torch.uint8)  # no machine has that much
        return logits(hidden)

    monkeypatch.setattr(engine.target, "logits", hungry)
    watched = Watched(engine)
    names = [engine.add_request(A, PARAMS) for _ in range(4)]
    outputs = {output.request_id: output for output in engine.step()}
    assert watched.shapes == [(1, 20)] * 4
    monkeypatch.undo()
    outputs |= run_all(engine)
    assert len({tuple(outputs[name].token_ids) for name in names}) == 1
    assert all(len(outputs[name].logprobs) == 9 for name in names)


@pytest.mark.parametrize(("rows", "order"), [(0, [A, A, A, A]), (ROWS, [A, B, A, B])], ids=["each alone", "together"])
def test_a_step_without_memory_ends_the_request_that_came_last(
    base: LLMEngine, rows: int, order: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those, too, that were scheduled at one time."""
    engine = engine_like(base, rows)
    names = [engine.add_request(prompt, PARAMS) for prompt in order]
    while engine.num_running < 4:
        engine.step()
    monkeypatch.setattr(engine.target, "logits", raising([0], engine.target.logits))
    outputs = run_all(engine)
    assert "out of memory while 4 requests were decoded" in str(outputs[names[3]].error)
    alone = engine_like(base, 0, max_num_seqs=1)
    for name, prompt in zip(names[:3], order, strict=False):
        assert outputs[name].token_ids == alone.generate([prompt], [PARAMS])[0].token_ids


@pytest.mark.parametrize("rows", [0, ROWS])
def test_a_broken_prompt_ends_those_that_ask_for_it(base: LLMEngine, rows: int) -> None:
    engine = engine_like(base, rows, max_num_seqs=6)
    engine.target.embedding[319, 3] = float("nan")
    broken = [*A[:5], 319]
    order = [B, broken, broken, A, broken, A]
    names = [engine.add_request(prompt, PARAMS) for prompt in order]
    outputs = run_all(engine)
    alone = engine_like(base, 0, max_num_seqs=1)
    for name, prompt in zip(names, order, strict=True):
        if prompt == broken:
            assert "the scores of token 1 hold a NaN" in str(outputs[name].error)
        else:
            assert outputs[name].token_ids == alone.generate([prompt], [PARAMS])[0].token_ids
