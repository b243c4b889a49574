"""Acceptance that is held, in the captured step's body as plain calls."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_graphs import engines
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.benchmark.gpu.curve import curve_rows
from fourfold.benchmark.gpu.oracle import Oracle
from fourfold.benchmark.gpu.recipe import answer_lengths, recipe_rows
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

    def engine(self, precision: str, shape: DraftShape, sequences: int, length: int) -> LLMEngine:
        plan = {"drafter_seed": 3, "plan": DraftPlan({1: shape})} if shape != NO_DRAFTS else {}
        return engines(self.path, max_num_seqs=sequences, max_model_len=length, **plan)[1]

    def prompts(self, count: int, context: int) -> list[list[int]]:
        return [[1 + i % 7, 5, 3][:context] for i in range(count)]


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
