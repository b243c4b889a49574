"""The draft plan: replayed drafts are what decoding accepts, and the search picks what is fastest."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chain import manifest, shared_chain
from tiny_models import tiny_drafter, tiny_engine, tiny_tokenizer

from fourfold.artifacts import read_manifest
from fourfold.config.engine import EngineSettings
from fourfold.drafter.samples import Text
from fourfold.engine import SamplingParams, load_engine
from fourfold.engine.build import build_engine
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.errors import FourfoldError
from fourfold.modeling.attention import padded_length
from fourfold.tuning.search import Measurement, batch_sizes, best_plan, candidates, worth_timing
from fourfold.tuning.simulate import Yield, read_answers, simulate
from fourfold.tuning.stage import engine_for, tune_engine

AUTO = EngineSettings(
    precision="bf16", drafter="redrafter", beam_width="auto", beam_length="auto", draft_min_p="auto", max_num_seqs=6
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "shape", [NO_DRAFTS, DraftShape(1, 4), DraftShape(3, 4), DraftShape(3, 4, 0.2), DraftShape(2, 2)]
)
def test_a_replay_accepts_what_decoding_accepts(shape: DraftShape, temperature: float, tmp_path: Path) -> None:
    """The same drafts, the same verifications: counts of a real decoding, one request at a time."""
    engine = tiny_engine(tmp_path, drafter_seed=1, shape={"vocab_size": 16}, plan=DraftPlan({1: shape}), max_num_seqs=1)
    prompts = [[n, 15 - n] for n in range(1, 11)]
    params = [SamplingParams(max_tokens=61, temperature=temperature, seed=i, ignore_eos=True) for i in range(10)]
    outputs = engine.generate(prompts, params)
    texts = [Text(str(i), str(i), tuple(o.prompt_token_ids), tuple(o.token_ids), i) for i, o in enumerate(outputs)]
    assert engine.drafter is not None
    found = simulate(engine.drafter, engine.target, read_answers(engine.target, texts, temperature), shape)
    if shape == NO_DRAFTS:
        assert found == Yield(1.0, 0.0)
        return
    steps = sum(output.speculation.num_drafts for output in outputs)
    assert sum(output.speculation.num_accepted_tokens for output in outputs) > 15
    # The first token of an answer comes from its prompt.
    assert found.tokens == pytest.approx(10 * 60 / steps)
    assert found.drafts == pytest.approx(sum(o.speculation.num_draft_tokens for o in outputs) / steps, rel=0.02)


def test_sequences_that_share_drafts_are_replayed_together(tmp_path: Path) -> None:
    """As on a GPU: among many positions the likeliest are verified, which yields more for as many."""
    engine = tiny_engine(tmp_path, drafter_seed=1, shape={"vocab_size": 16})
    params = [SamplingParams(max_tokens=61, seed=i, ignore_eos=True) for i in range(10)]
    outputs = engine.generate([[n, 15 - n] for n in range(1, 11)], params)
    texts = [Text(str(i), str(i), tuple(o.prompt_token_ids), tuple(o.token_ids), i) for i, o in enumerate(outputs)]
    answers, target = read_answers(engine.target, texts, 0), copy.copy(engine.target)
    target.device = torch.device("cuda")  # nothing is computed there
    assert engine.drafter is not None
    all_of_them = DraftShape(3, 4)
    for shape in (DraftShape(3, 4, draft_tokens=1), DraftShape(3, 4, draft_tokens=3), all_of_them, DraftShape(1, 3)):
        alone, together = (simulate(engine.drafter, target, answers, shape, x) for x in (False, True))
        assert alone.drafts == shape.nodes - 1
        if shape.shares:
            assert alone.drafts != together.drafts == pytest.approx(alone.drafts, rel=0.3)
            assert together.tokens / (1 + together.drafts) > 0.9 * alone.tokens / (1 + alone.drafts)
        else:
            assert alone == together


def test_what_a_row_fixes_stays_fixed() -> None:
    half = EngineSettings(precision="bf16", drafter="redrafter", beam_width=2, beam_length="auto")
    assert candidates(half, 3, on_cpu=True) == [NO_DRAFTS, DraftShape(2, 2), DraftShape(2, 3), DraftShape(2, 4)]
    assert {shape.min_p for shape in candidates(AUTO, 3, on_cpu=False)} == {0.0}


def test_a_gpu_is_offered_trees_that_reach_the_end_of_their_trunk() -> None:
    auto = AUTO.model_copy(update={"draft_tokens": "auto"})
    none, *shapes = candidates(auto, 3, on_cpu=False)
    assert none == NO_DRAFTS
    assert shapes[:3] == [DraftShape.chain(drafts) for drafts in (1, 2, 3)]
    assert {shape.beam_width for shape in shapes[3:]} == {4}
    for shape in shapes[3:]:
        assert shape.draft_tokens is not None
        assert shape.beam_length - 1 <= max(2, shape.draft_tokens)
        assert shape.draft_tokens < 4 * (shape.beam_length - 1)
        assert shape.shares
    assert len(set(shapes)) == len(shapes)
    assert all(shape.draft_tokens is None for shape in candidates(auto, 3, on_cpu=True))


def test_shapes_that_are_beaten_in_everything_are_not_timed() -> None:
    yields = {
        NO_DRAFTS: Yield(1.0, 0.0),
        DraftShape(1, 3): Yield(1.5, 2.0),
        DraftShape(1, 4): Yield(1.6, 3.0),
        DraftShape(2, 3): Yield(1.6, 3.5),
        DraftShape(2, 4): Yield(1.9, 5.0),
    }
    assert worth_timing(yields) == [NO_DRAFTS, DraftShape(1, 3), DraftShape(1, 4), DraftShape(2, 4)]


@given(st.integers(1, 100))
def test_batch_sizes_reach_the_most(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))


def test_the_fastest_wins_and_a_near_tie_goes_to_the_smaller() -> None:
    narrow, wide = DraftShape(1, 3), DraftShape(3, 4)

    def measured(running: int, shape: DraftShape, tokens: float, seconds: float) -> Measurement:
        return Measurement(running, shape, Yield(tokens, 0), seconds)

    plan = best_plan(
        [
            *(measured(1, NO_DRAFTS, 1, 0.01), measured(1, narrow, 1.5, 0.012), measured(1, wide, 2.0, 0.013)),
            *(measured(2, NO_DRAFTS, 1, 0.01), measured(2, narrow, 1.5, 0.012), measured(2, wide, 2.0, 0.0159)),
            *(measured(4, NO_DRAFTS, 1, 0.01), measured(4, narrow, 1.5, 0.016), measured(4, wide, 2.0, 0.021)),
        ]
    )
    assert plan.shapes == {1: wide, 2: narrow, 4: NO_DRAFTS}
    assert [plan.shape(n) for n in (1, 2, 3, 4, 9)] == [wide, narrow, NO_DRAFTS, NO_DRAFTS, NO_DRAFTS]
    assert DraftPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.lanes(8) == 8


def test_the_stage_measures_and_the_engine_obeys(chain: Path) -> None:
    tuning = read_manifest(manifest(chain, "tuning"))
    search = pd.read_csv(chain / "tuning" / "search.csv")
    assert set(search["running"]) == {1, 2, 4}
    assert (search["step_ms"] > 0).all()
    for running, rows in search.groupby("running"):
        chosen = tuning["plan"][str(running)]
        same = (rows[list(chosen)] == pd.Series(chosen)) | (rows[list(chosen)].isna() & pd.Series(chosen).isna())
        row = rows[same.all(axis=1)]
        assert len(row) == 1
        assert row["output_throughput"].item() >= rows["output_throughput"].max() / 1.02 / 1.02
    engine = load_engine(chain / "engines" / "bf16-tuned", "cpu")
    assert engine.plan.to_json() == tuning["plan"]
    assert read_manifest(manifest(chain, "engines/bf16-tuned"))["tuning_seconds"] > 0
    plain = load_engine(chain / "engines" / "bf16", "cpu")
    prompts, params = [[5, 6, 7], [9, 8]], [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=1)]
    expected = [output.token_ids for output in plain.generate(prompts, params)]
    assert [output.token_ids for output in engine.generate(prompts, params)] == expected


def test_an_open_row_needs_its_plan(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="give the manifest of tune_engine with --tuning"):
        build_engine(AUTO, manifest(chain, "model"), manifest(chain, "drafter"), None, tmp_path / "e" / "manifest.json")


def test_texts_must_fit_the_engine(chain: Path, tmp_path: Path) -> None:
    inputs = [manifest(chain, name) for name in ("model", "drafter", "data")]
    small = AUTO.model_copy(update={"max_model_len": 16})
    with pytest.raises(FourfoldError, match="no held-out prompt is shorter than half of max_model_len 16"):
        tune_engine(small, *inputs, tmp_path / "t" / "manifest.json", "cpu")


def test_seeds_draw_the_same_text_with_and_without_drafts(tmp_path: Path) -> None:
    plain = tiny_engine(tmp_path / "a", shape={"vocab_size": 16})
    drafted = tiny_engine(tmp_path / "b", drafter_seed=1, shape={"vocab_size": 16}, beam_width=3)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 16, (1 + i % 9,), generator=generator).tolist() for i in range(30)]
    params = [
        SamplingParams(max_tokens=30, temperature=0.5 + i % 3, top_k=i % 4 * 3, top_p=1 - i % 2 * 0.2, seed=i)
        for i in range(30)
    ]
    expected = [output.token_ids for output in plain.generate(prompts, params)]
    assert [output.token_ids for output in drafted.generate(prompts, params)] == expected


def test_beams_that_have_no_room_in_the_cache_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_engine(tmp_path).target
    settings = AUTO.model_copy(update={"max_model_len": 256})
    shapes = candidates(settings, most_drafts=3, on_cpu=True)
    positions = padded_length(256 + 3, 16, target.device)  # 384 or 512, as the processor sums
    slot = 2 * 2 * 2 * 16 * 4 * positions  # layers x key and value x heads x width x bytes x positions
    monkeypatch.setattr("fourfold.engine.memory.step_bytes", lambda *arguments: 0)

    def fitting(slots: int) -> set[int]:
        monkeypatch.setattr("fourfold.engine.memory.available_bytes", lambda device: slots * slot)
        engine, tried = engine_for(settings, shapes, target, tiny_drafter(target, 1), tiny_tokenizer())
        assert engine.plan.beam_width == max(shape.beam_width for shape in tried)
        return {shape.beam_width for shape in tried}

    assert fitting(6 * 4) == {1, 2, 3, 4}
    assert fitting(6 * 2 + 3) == {1, 2}
    assert fitting(6) == {1}
    with pytest.raises(FourfoldError, match=r"KV cache: 6 slots .* slots of that length would fit"):
        fitting(5)


def test_what_is_timed_is_the_engine_of_the_row(tmp_path: Path) -> None:
    target = tiny_engine(tmp_path).target
    settings = AUTO.model_copy(update={"max_model_len": 64, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 16})
    shapes = [DraftShape(2, 3), DraftShape(1, 2)]
    engine, tried = engine_for(settings, shapes, target, tiny_drafter(target, 1), tiny_tokenizer())
    assert tried == shapes
    assert engine._cache.data.dtype == torch.float8_e4m3fn
    assert engine.max_num_batched_tokens == 16
