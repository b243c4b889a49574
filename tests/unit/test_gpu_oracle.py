"""Acceptance that is held, in the captured step's body as plain calls."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import Uncaptured, engines
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.benchmark.gpu.curve import curve_rows
from fourfold.benchmark.gpu.oracle import Oracle
from fourfold.benchmark.gpu.real_text import TextCase, capture_steps
from fourfold.benchmark.gpu.recipe import answer_lengths, recipe_rows
from fourfold.benchmark.gpu.steps import add_requests, requests
from fourfold.benchmark.rows import write_csv
from fourfold.engine import LLMEngine
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.errors import FourfoldError
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.transformer import Transformer
from fourfold.report.plots_gpu import plot_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: bench-gpu itself runs")


@pytest.fixture(autouse=True)
def plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's own forward for the interpreter's, which takes a second for three steps."""

    def forward(target: Transformer, tokens: Tensor, positions: Tensor, cache: KVCache, *_: None) -> Tensor:
        tokens = tokens.view(positions.shape)
        hidden = target.forward(tokens, positions, cache.slots(0, len(tokens)), int(positions.max()) + 1)
        return hidden.flatten(0, 1)

    monkeypatch.setattr("fourfold.engine.graphs.decode_forward", forward)


@dataclass
class Tiny:
    """Gives what `Measured` gives, of engines whose steps are not captured but run."""

    path: Path
    weights: str = "random"
    fp8_drafter: bool = False

    def engine(
        self, precision: str, shape: DraftShape, sequences: int, length: int, prefix_caching: bool = False
    ) -> LLMEngine:
        plan = {"drafter_seed": 3, "plan": DraftPlan({1: shape})} if shape != NO_DRAFTS else {}
        limits = {"max_num_seqs": sequences, "max_model_len": length, "enable_prefix_caching": prefix_caching}
        return engines(self.path, **limits, **plan)[1]

    def prompt(self, context: int) -> list[int]:
        return [1, 5, 3][:context]


def test_the_curve_reaches_what_is_held(tmp_path: Path) -> None:
    rows = list(curve_rows(Tiny(tmp_path), 2, 3, 2, 6))  # type: ignore[arg-type]
    assert [row["engine"] for row in rows] == ["bf16"] + ["fp8-redrafter"] * (7 + 3) + ["fp8-all-redrafter"] * 3
    assert [row["drafts"] for row in rows] == [0] + [3] * 7 + [2] * 6
    assert rows[0]["acceptance_length"] is None
    for row in rows[1:]:
        held, got = row["held_acceptance"], row["acceptance_length"]
        assert got == pytest.approx(held, abs=0.0 if held % 1 == 0 else 0.4)
        assert row["over_bf16"] == pytest.approx(row["sequence_throughput"] / rows[0]["sequence_throughput"])
    about = {"device": "here", "date": "today", "torch": "any"}
    write_csv(tmp_path / "rows.csv", [row | about for row in rows])
    plot_gpu(tmp_path / "rows.csv", tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert "2 drafts, context 3" in text


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_prompt_for_many_is_read_once(tmp_path: Path, drafts: int) -> None:
    """Each of the requests has it from the cache but for its last token, and the same tokens as if it had read it."""
    prompt, params = [7, 5, 3, 2] * 5, requests([6, 6, 6], 0.7)
    shape = DraftShape.chain(drafts)
    expected = Tiny(tmp_path).engine("bf16", shape, 3, 40).generate([prompt] * 3, params)
    engine = Tiny(tmp_path).engine("bf16", shape, 3, 40, prefix_caching=True)
    names, got = add_requests(engine, prompt, params), {}
    while engine.has_unfinished:
        got |= {output.request_id: output for output in engine.step()}
    assert [got[name].num_cached_tokens for name in names] == [len(prompt) - 1] * 3
    assert [got[name].token_ids for name in names] == [output.token_ids for output in expected]


def test_what_is_timed_was_captured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests of a batch still run, their step is there."""
    captured: list[tuple[int, DraftShape]] = []
    capture = Uncaptured._capture

    def note(self: Uncaptured, size: int, shape: DraftShape) -> Any:
        captured.append((size, shape))
        return capture(self, size, shape)

    monkeypatch.setattr(Uncaptured, "_capture", note)
    engine = Tiny(tmp_path).engine("fp8", DraftShape.chain(2), 9, 60)
    capture_steps(engine, [7, 5, 3], TextCase(9, 0.7, "benchmark"))
    assert sorted(size for size, _ in captured) == [1, 2, 3, 4, 6, 8, 9]
    engine.generate([[1 + i % 7, 5] for i in range(11)], requests([3 + i for i in range(11)], 0.7))
    assert len(captured) == 7


def test_the_recipes_workload_stops_early_and_holds_acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourfold.benchmark.gpu.recipe.CONTEXT", 3)
    monkeypatch.setattr("fourfold.benchmark.gpu.recipe.GENERATIONS", 4)
    monkeypatch.setattr("fourfold.benchmark.gpu.recipe.KEPT", 3)
    plain, fp8, drafted, whole = recipe_rows(Tiny(tmp_path), 32, 2, 2.0)  # type: ignore[arg-type]
    lengths = sorted(answer_lengths(32))
    for row in (plain, fp8):
        # The fourth is as far as the third when that ends, and has the step that was launched ahead.
        assert row["output_tokens"] == sum(lengths[:3]) + lengths[2] + 1
        assert row["over_bf16"] == pytest.approx(plain["seconds"] / row["seconds"])
    for row in (drafted, whole):
        assert row["acceptance_length"] == pytest.approx(2.0, abs=0.1)


def test_without_captured_steps_nothing_is_held(tmp_path: Path) -> None:
    eager, _ = engines(tmp_path, drafter_seed=1)
    with pytest.raises(FourfoldError, match="on a GPU only"):
        Oracle(eager, 2, 10)
