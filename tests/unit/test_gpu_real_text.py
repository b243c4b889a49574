"""bench-gpu with real text on a CPU, its refusals, and the profiler's gaps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_benchmark import LARGE
from tiny_chain import manifest, shared_chain

from fourfold.artifacts import write_artifact
from fourfold.benchmark.gpu import GpuBenchmark, benchmark_gpu, parity
from fourfold.benchmark.gpu.host_gap import gap_shares
from fourfold.benchmark.gpu.real_text import equality
from fourfold.benchmark.rows import read_csv
from fourfold.engine.requests import RequestOutput
from fourfold.errors import FourfoldError
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, save_redrafter
from fourfold.report.plots_gpu import plot_gpu

SHAPE = replace(LARGE, vocab_size=640)


def test_real_text_on_a_carrier_and_on_the_small_model(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chain, output, drafter = shared_chain(tmp_path_factory), tmp_path / "rows.csv", tmp_path / "drafter/manifest.json"
    torch.manual_seed(1)
    with write_artifact(drafter, stage="train_drafter", settings={}) as staging:
        save_redrafter(Redrafter(RedrafterConfig(512, 64, 128, draft_vocab_size=64), torch.arange(64)), staging.path)
    settings = GpuBenchmark(parts=("text",), sequences=(2,), answers=2, max_tokens=6)
    problems = manifest(chain, "problems")
    benchmark_gpu(settings, output, manifest(chain, "model"), drafter, problems, "cpu", SHAPE)
    rows = read_csv(output)
    texts = [row for row in rows if row["part"] == "text"]
    kinds = {(row["temperature"], row["split"]) for row in texts}
    assert kinds == {(temperature, split) for temperature in (0, 0.7) for split in ("benchmark", "unseen")}
    plain = [("bf16", None), ("fp8", None), ("fp8-all", None)]
    drafted = [("fp8-redrafter", shape) for shape in ("4x5:11", "1x3", "4x5:7")]
    engines = {"carrier": [*plain, *drafted, *((f"{name}-redrafter", "4x5:11") for name in ("bf16", "fp8-all"))]}
    engines["small"] = [*plain[:2], *((f"{name}-redrafter", "4x5:11") for name in ("fp8", "bf16"))]
    found = [(row["weights"], row["engine"], row["shape"]) for row in texts]
    # The small model is asked greedily, one kind of problem, with the first shape.
    times = {"carrier": len(kinds), "small": 1}
    assert found == [(name, *engine) for name in times for engine in engines[name] for _ in range(times[name])]
    for row in texts:
        assert row["sequence_throughput"] > 0
        assert row["answers"] == 2
        if row["drafts"]:
            assert row["equal_answers"] == 2, "on a CPU drafts change no token"
            assert 1 <= row["acceptance_length"] <= row["drafts"] + 1
    assert sum(row["part"] == "best" for row in rows) == len(kinds) + 1


@pytest.mark.parametrize("broken", ["_fp8_products", "_logits", "_tokens"])
def test_a_device_that_computes_wrongly_is_not_timed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "_tokens":
        right = parity._answers
        monkeypatch.setattr(parity, "_answers", lambda *a, **k: [x[1:] if a[1] else x for x in right(*a, **k)])
    else:
        name = "make_linear" if broken == "_fp8_products" else "_logits_of"
        right = getattr(parity, name)
        calls: list[Any] = []

        def wrong(*arguments: Any) -> Any:
            """The second of each pair of calls gives 5 % too much."""
            calls.append(arguments)
            result = right(*arguments)
            off = 1.05 if len(calls) % 2 == 0 else 1.0
            return (lambda x: result(x) * off) if callable(result) else result * off

        monkeypatch.setattr(parity, name, wrong)
    with pytest.raises(FourfoldError, match="parity check failed"):
        parity.check_parity(torch.device("cpu"))


def test_gaps_between_steps_and_inside_them() -> None:
    copy, kernel = "Memcpy DtoH (Device -> Pageable)", "attend"
    spans = [(kernel, 0, 8), (copy, 8, 10), (kernel, 13, 50), (kernel, 40, 60), (kernel, 61, 105), (copy, 108, 110)]
    assert gap_shares(spans[::-1]) == {"host_gap": pytest.approx(0.03), "idle": pytest.approx(0.07)}
    assert gap_shares(spans[:3])["host_gap"] is None


def test_equality_tells_where_answers_part() -> None:
    plain = [RequestOutput("", [], tokens) for tokens in ([1, 2, 3], [1, 2, 3], [4, 5])]
    drafted = [RequestOutput("", [], tokens) for tokens in ([1, 2, 3], [1, 9, 3], [4, 5, 6])]
    assert equality(plain, drafted) == {"equal_answers": 1, "first_difference": 1.5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ("step",)}, "'step' is unknown; choose from drafter, steps, text"),
        ({"steps": 0}, "must be 1 or more"),
        ({"longest": 8}, "must be 32 or more"),
        ({"acceptance": 5.0}, "3 drafts give between 1 and 4"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        GpuBenchmark(**wrong)


def test_a_model_without_its_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="give --model, --problems and one of --drafter and --config together"):
        benchmark_gpu(GpuBenchmark(), tmp_path / "rows.csv", tmp_path, None, None, "cpu")


def test_a_plot_needs_held_acceptance(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("part,drafts\nsteps,3\n")
    with pytest.raises(FourfoldError, match="no rows of part oracle"):
        plot_gpu(rows, tmp_path / "curve.svg")
