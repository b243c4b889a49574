"""Several short prompts in one forward, as on a GPU: the same tokens and states, and what goes wrong stays with one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_load import Load
from tiny_models import run_all, tiny_engine, tiny_tokenizer
from torch import Tensor

from fourfold.engine import LLMEngine, SamplingParams, tell
from fourfold.engine.draft_plan import DraftPlan
from fourfold.engine.memory import step_bytes
from fourfold.engine.prefill import PREFILL_KEYS
from fourfold.model.carrier import QWEN2_14B
from fourfold.modeling.attention import padded_length
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.transformer import Transformer

ROWS = 2048
BROKEN = 319
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
PLANS = {"plain": None, "one beam": DraftPlan.fixed(1, 4), "beams": DraftPlan.fixed(3, 3)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"), drafter_seed=3)


def engine_like(base: LLMEngine, rows: int = ROWS, plan: DraftPlan | None = None, **options: Any) -> LLMEngine:
    """An engine over the same model, with an embedding that a test may break."""
    source = base.target
    parts = source.config, source.embedding.clone(), source.layers, source.norm, source.lm_head
    target = Transformer(*parts, source.device, source.dtype)
    options = {"max_num_seqs": 5, "max_model_len": 400, "plan": plan, **options}
    drafter = None if plan is None else base.drafter
    engine = LLMEngine(target, tiny_tokenizer(), end_token_ids=(0,), drafter=drafter, **options)
    engine.prefill.max_rows = rows
    return engine


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, BROKEN, (n,), generator=generator).tolist() for n in lengths]


class Watched:
    """Remembers the shapes of the tokens of all forwards, and may fail at some."""

    def __init__(self, engine: LLMEngine, fails: Callable[[Tensor], bool] = lambda tokens: False) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._forward, self._fails = engine.target.forward, fails
        engine.target.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache, *arguments: Any) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        if self._fails(tokens):
            torch.empty(2**60, dtype=torch.uint8)  # no machine has that much
        return self._forward(tokens, positions, cache, *arguments)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Those of prompts; no answer has drafts here."""
        return [shape for shape in self.shapes if shape[1] > 1]


@given(
    lengths=st.lists(st.one_of(st.integers(1, 30), st.integers(1, 330)), min_size=1, max_size=12),
    rows=st.sampled_from([256, 1024, 2048]),
    prefixes=st.booleans(),
    most=st.sampled_from([None, 50, 300]),
    plan=st.sampled_from(list(PLANS)),
)
@settings(max_examples=40, deadline=None)
def test_tokens_are_those_of_prompts_read_alone(
    base: LLMEngine, lengths: list[int], rows: int, prefixes: bool, most: int | None, plan: str
) -> None:
    prompts = prompts_of(lengths)
    params = [
        SamplingParams(max_tokens=(1, 6, 11)[i % 3], temperature=0.8 * (i % 2), seed=i, logprobs=0 if i % 4 else None)
        for i in range(len(prompts))
    ]
    options = {"max_num_batched_tokens": most, "enable_prefix_caching": prefixes}
    alone, together = (engine_like(base, r, PLANS[plan], **options) for r in (0, rows))
    watched = Watched(together)
    # The second time, prompts begin as ended sequences did, if those are kept.
    for _ in range(2):
        expected, got = alone.generate(prompts, params), together.generate(prompts, params)
        assert [(o.token_ids, o.text, o.finish_reason) for o in got] == [
            (o.token_ids, o.text, o.finish_reason) for o in expected
        ]
        assert [[p.token for p in o.logprobs] for o in got] == [[p.token for p in o.logprobs] for o in expected]
        assert [o.num_cached_tokens for o in got] == [o.num_cached_tokens for o in expected]
        assert all(o.num_cached_tokens == 0 or prefixes for o in got)
        assert all((o.scheduled_time or 0) > o.arrival_time for o in got)
    for batch, tokens in watched.prompts:
        assert batch == 1 or tokens < 12 or batch * padded_length(tokens, 16, base.target.device) <= rows


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["float32", "fp8"])
def test_states_keys_and_values_are_those_of_prompts_read_alone(
    base: LLMEngine, cache_dtype: torch.dtype | None
) -> None:
    prompts = prompts_of([40, 3, 100, 64, 1])
    alone, together = (engine_like(base, rows, kv_cache_dtype=cache_dtype) for rows in (0, ROWS))
    watched = Watched(together)
    for engine in (alone, together):
        for prompt in prompts:
            engine.add_request(prompt, PARAMS)
        assert len(engine.step()) == 5
    assert watched.shapes == [(5, 100)]
    torch.testing.assert_close(together._hidden, alone._hidden, rtol=1e-4, atol=1e-4)
    for slot, prompt in enumerate(prompts):
        got, expected = (e._cache.data[:, slot, :, : len(prompt)].float() for e in (together, alone))
        torch.testing.assert_close(got, expected, rtol=1e-4 if cache_dtype is None else 0.13, atol=1e-4)


def test_a_forward_has_so_many_rows_at_most(base: LLMEngine) -> None:
    block = padded_length(20, 16, base.target.device)
    engine = engine_like(base, rows=3 * block, max_num_seqs=8)
    watched = Watched(engine)
    engine.generate(prompts_of([20, 5, 19, 20, 2, 350, 3, 4]), [SamplingParams(max_tokens=1)] * 8)
    assert watched.shapes == [(3, 20), (2, 20), (1, 350), (2, 4)]


def test_what_needs_more_than_its_last_state_is_read_alone(base: LLMEngine) -> None:
    """Probabilities of the prompt's tokens; what is known of a prompt is not read at all."""
    engine = engine_like(base, max_num_seqs=8, enable_prefix_caching=True)
    prompts = prompts_of([20, 21, 22, 23])
    engine.generate(prompts[:1], [PARAMS])
    watched = Watched(engine)
    first = SamplingParams(max_tokens=1)
    known = [*prompts[0], 5]
    asked = SamplingParams(max_tokens=1, prompt_logprobs=1)
    outputs = engine.generate(
        [*prompts[1:3], known, prompts[3], [4, 4], [7] * 9], [first, first, first, first, first, asked]
    )
    assert watched.shapes == [(5, 23), (1, 9)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 20, 0, 0, 0]
    assert len(outputs[-1].prompt_logprobs) == 9


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["float32", "fp8"])
def test_the_rest_of_prompts_is_read_behind_what_is_known(base: LLMEngine, cache_dtype: torch.dtype | None) -> None:
    """Rests of several lengths behind beginnings of several lengths, up to the end of a slot."""
    kept, others = prompts_of([150, 300]), prompts_of([20, 20, 20, 90])
    parts = (
        (kept[0][:149], [9]),
        (kept[1], others[3]),
        (kept[1][:200], others[1][:3]),
        ([], others[2]),
        (kept[0][:70], []),
    )
    prompts = [[*known, *rest] for known, rest in parts]
    alone, together = (
        engine_like(base, rows, kv_cache_dtype=cache_dtype, enable_prefix_caching=True) for rows in (0, ROWS)
    )
    watched = Watched(together)
    for engine in (alone, together):
        engine.generate(kept, [SamplingParams(max_tokens=1)] * 2)
        for prompt in prompts:
            engine.add_request(prompt, PARAMS)
        assert len(engine.step()) == 5
        assert [s.output.num_cached_tokens for s in engine._running] == [149, 300, 200, 0, 69]
    assert watched.shapes[-1] == (5, 90)
    torch.testing.assert_close(together._hidden, alone._hidden, rtol=1e-4, atol=1e-4)
    for slot, prompt in enumerate(prompts):
        got, expected = (e._cache.data[:, slot, :, : len(prompt)].float() for e in (together, alone))
        torch.testing.assert_close(got, expected, rtol=1e-4 if cache_dtype is None else 0.13, atol=1e-4)


@pytest.mark.parametrize(
    ("sources", "known", "shapes"),
    [([3, 1, 2], [True] * 3, [(3, 1)]), ([2, 3, 1], [True, True, False], [(2, 1), (1, 41)])],
    ids=["in their own slots", "in those of others"],
)
def test_what_is_known_is_copied_before_its_slot_is_written(
    base: LLMEngine, sources: list[int], known: list[bool], shapes: list[tuple[int, int]]
) -> None:
    """Beginnings that lie where requests are to run: what is lost is read again."""
    kept = prompts_of([40, 40, 40])
    for rows in (0, ROWS):
        engine = engine_like(base, rows, max_num_seqs=3, enable_prefix_caching=True)
        engine.generate(kept, [SamplingParams(max_tokens=1)] * 3)
        assert engine._slots._prefixes is not None
        found = dict(engine._slots._prefixes._kept)
        assert sorted(found) == [1, 2, 3]
        prompts = [[*found[source], 3] for source in sources]
        watched = Watched(engine)
        outputs = engine.generate(prompts, [PARAMS] * 3)
        expected = engine_like(base, 0).generate(prompts, [PARAMS] * 3)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        assert [output.num_cached_tokens for output in outputs] == [40 * here for here in known]
    assert watched.shapes[: len(shapes)] == shapes


def test_a_forward_looks_at_so_many_keys_at_most(base: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_like(base, enable_prefix_caching=True)
    block = padded_length(300, 16, base.target.device)
    monkeypatch.setattr("fourfold.engine.prefill.PREFILL_KEYS", 3 * block)
    prompt = prompts_of([300])[0]
    engine.generate([prompt], [SamplingParams(max_tokens=1)])
    watched = Watched(engine)
    engine.generate([[*prompt[:-i], 5] for i in range(1, 6)], [SamplingParams(max_tokens=1)] * 5)
    assert watched.shapes == [(3, 1), (2, 1)]


def test_a_step_reads_no_more_than_it_may(base: LLMEngine) -> None:
    engine = engine_like(base, max_num_batched_tokens=32)
    watched = Watched(engine)
    for prompt in prompts_of([10, 10, 10, 10, 40]):
        engine.add_request(prompt, PARAMS)
    assert len(engine.step()) == 3
    assert (engine.num_running, engine.num_waiting) == (3, 2)
    assert watched.shapes == [(3, 10)]
    run_all(engine)


def test_requests_that_end_with_their_first_token_leave_their_slots(base: LLMEngine) -> None:
    prompts = prompts_of([12, 30, 7, 22, 18])
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 9, 1, 1, 9)]
    expected = engine_like(base, rows=0).generate(prompts, params)
    engine = engine_like(base)
    names = [engine.add_request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    outputs = engine.step()
    assert [output.request_id for output in outputs] == names
    assert engine.num_running == 2
    assert sorted(sequence.slot for sequence in engine._running) == [0, 1]
    assert engine.add_request(prompts[0], params[0], names[0]) == names[0], "an id that ended can be had again"
    assert not engine.cancel(names[2])
    assert engine.cancel(names[1])
    run_all(engine)
    assert [o.token_ids for o in outputs if o.finish_reason == "length"] == [
        o.token_ids for o in [*expected[:1], *expected[2:]]
    ]


@pytest.mark.parametrize("prefixes", [False, True], ids=["fresh", "prefixes"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_nan_ends_the_requests_that_it_reaches(base: LLMEngine, plan: DraftPlan | None, prefixes: bool) -> None:
    """Shorter and longer broken prompts beside sound ones, in every slot."""
    prompts = prompts_of([30, 3, 45, 8, 20, 60])
    expected = [output.token_ids for output in engine_like(base, 0, plan).generate(prompts, [PARAMS] * 6)]
    engine = engine_like(base, plan=plan, enable_prefix_caching=prefixes)
    engine.target.embedding[BROKEN, 3] = float("nan")
    engine.target.embedding[0, 3] = float("nan")  # no prompt has it, so it may not fill one up
    for i, prompt in enumerate(prompts):
        engine.add_request(prompt, PARAMS, str(i))
        engine.add_request([*prompt[:4], BROKEN, *[4] * (70 * (i % 2))], PARAMS, f"broken {i}")
    outputs = run_all(engine)
    assert [outputs[str(i)].token_ids for i in range(6)] == expected
    assert all("the scores of token 1 hold a NaN" in str(outputs[f"broken {i}"].error) for i in range(6))


@pytest.mark.parametrize("unfit", [None, 2], ids=["each fits alone", "one does not fit"])
@pytest.mark.parametrize("where", ["forward", "logits", "logprobs"])
def test_prompts_that_do_not_fit_together_are_read_one_by_one(
    base: LLMEngine, unfit: int | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([30, 3, 45, 8, 20])
    expected = [output.token_ids for output in engine_like(base, 0).generate(prompts, [PARAMS] * 5)]
    engine = engine_like(base)
    for i, prompt in enumerate(prompts):
        engine.add_request(prompt, PARAMS, str(i))
    if where == "forward":
        watched = Watched(engine, lambda tokens: len(tokens) > 1 or (unfit is not None and tokens.shape[1] == 45))
    else:
        watched = Watched(engine)
        # The first call is for all, then comes each prompt's; probabilities are computed for one at a time.
        all_at, first = (0, 1) if where == "logits" else (3, 4)
        owner, name = (engine.target, "logits") if where == "logits" else (tell, "token_logprobs")
        function, calls = getattr(owner, name), iter(range(100))

        def hungry(*arguments: Any) -> Any:
            if next(calls) in (all_at, *([] if unfit is None else [first + unfit])):
                torch.empty(2**60, dtype=torch.uint8)
            return function(*arguments)

        monkeypatch.setattr(owner, name, hungry)
    assert len(engine.step()) == 5
    assert watched.shapes == [(5, 45), *[(1, len(prompt)) for prompt in prompts]]
    engine.target.forward = watched._forward  # type: ignore[method-assign]
    outputs = run_all(engine)
    for i, tokens in enumerate(expected):
        output = outputs.get(str(i))
        if i == unfit:
            assert output is None, "it was told of before"
            continue
        assert output is not None
        assert output.token_ids == tokens == [p.token for p in output.logprobs]
    if unfit is not None:
        assert engine.add_request(prompts[unfit], PARAMS, str(unfit))
        assert run_all(engine)[str(unfit)].token_ids == expected[unfit]


@pytest.mark.parametrize("prefixes", [False, True], ids=["fresh", "prefixes"])
def test_hundreds_of_requests_answer_as_with_prompts_read_alone(base: LLMEngine, prefixes: bool) -> None:
    checksums = set()
    for rows in (0, ROWS):
        engine = engine_like(base, rows, PLANS["one beam"], max_model_len=128, enable_prefix_caching=prefixes)
        load = Load(engine, seed=5, check_every=4)
        load.run(200)
        assert min(load.stopped, load.full, load.cancelled_running, load.cancelled_waiting, load.checked) > 0
        checksums.add(load.checksum)
    assert len(checksums) == 1


def test_a_cpu_reads_each_prompt_by_itself(tmp_path: Path) -> None:
    assert tiny_engine(tmp_path).prefill.max_rows == 0


def test_memory_for_prompts_read_together() -> None:
    """Their activations, beside which the mask of a long prompt's part is larger than theirs."""
    alone, together = (step_bytes(QWEN2_14B, 12, 512, 20032, rows, rows) for rows in (0, ROWS))
    config = QWEN2_14B
    row = 4 * (4 * config.intermediate_size + 8 * config.hidden_size)
    assert together - alone == (ROWS - 512) * row
    # Where all are short, the masks of several prompts are the larger ones.
    group = config.num_attention_heads // config.num_key_value_heads
    widened = config.kv_bytes_per_token // config.num_hidden_layers
    alone, together = (step_bytes(QWEN2_14B, 12, 100, 128, rows, rows) for rows in (0, ROWS))
    mask = (group + 1) * (ROWS * 128 - 100 * 128)
    assert together - alone == (ROWS - 100) * row + 4 * (mask + widened * (ROWS - 128))
    # Behind long known beginnings: no more keys to a token than a slot has, and no more to a forward than it may.
    fresh, known = (step_bytes(QWEN2_14B, 12, 512, 4096, ROWS, keys) for keys in (ROWS, PREFILL_KEYS))
    assert known - fresh == 4 * ((group + 1) * 4096 * (ROWS - 512) + widened * (PREFILL_KEYS - 4096))
    long = step_bytes(QWEN2_14B, 12, 512, 2 * PREFILL_KEYS, ROWS, PREFILL_KEYS)
    assert long == step_bytes(QWEN2_14B, 12, 512, 2 * PREFILL_KEYS, ROWS, ROWS), "a long prompt's part takes more"
