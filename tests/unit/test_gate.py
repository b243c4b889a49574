"""The accuracy gate: verdicts by hand, on real benchmarks, and in the files of the report."""

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chain import SETTINGS, benchmark, manifest, shared_chain

from fourfold.artifacts import read_manifest
from fourfold.config.benchmark import ReportSettings
from fourfold.config.engine import EngineSettings, Numerics
from fourfold.config.problems import Prompt
from fourfold.config.quantize import FidelitySettings, QuantizeSettings
from fourfold.config.stages import FidelityStage, QuantizeStage
from fourfold.engine.build import build_engine
from fourfold.fidelity.stage import compare_logits
from fourfold.quantize.stage import quantize_model
from fourfold.report import gate
from fourfold.report.data import EngineBenchmark, Results
from fourfold.report.plots_fidelity import plot_fidelity
from fourfold.report.stage import make_report

LOGITS = {
    "numerics": "fp8",
    "texts": 8,
    "tokens": 793,
    "kl": 0.03,
    "kl_low": 0.02,
    "kl_high": 0.04,
    "kl_max": 0.8,
    "top1_agreement": 0.93,
    "max_logit_difference": 8.26,
}


def engine(
    name: str,
    right: list[int],
    precision: str = "bf16",
    drafter: str = "none",
    rounded: dict[str, Any] | None = None,
    **facts: Any,
) -> EngineBenchmark:
    """An engine that answered one request a problem."""
    requests = [
        {
            "concurrency": 1,
            "repeat": 0,
            "workload": i,
            "index": 0,
            "problem_id": f"p{i}",
            "correct": bool(value),
            "text": f"answer {value}",
        }
        for i, value in enumerate(right)
    ]
    info = {"precision": precision, "drafter": drafter}
    settings = {"benchmark": {"temperature": 0.7, **facts}}
    manifest = {"engine_info": info, "engine_settings": info | (rounded or {}), "settings": settings}
    return EngineBenchmark(name, manifest, {}, [{}], requests, [])


def verdicts(results: Results, **limits: float) -> dict[tuple[str, str], str]:
    found = gate.checks(results, ReportSettings(**limits))
    return {(check.engine, check.check.split(",")[0]): check.verdict for check in found}


def test_verdicts_by_hand() -> None:
    half = [1, 0] * 100
    fp8 = engine("fp8", half, "fp8")
    results = Results([engine("bf16", half), fp8, engine("bad", [0] * 200)], fidelity={"fp8": LOGITS})
    assert verdicts(results) == {("fp8", "accuracy"): "pass", ("fp8", "KL"): "pass", ("bad", "accuracy"): "fail"}
    # Two hundred equal answers show that no more than 1 point is lost, but not that no more than half a point is.
    assert verdicts(results, max_accuracy_drop=0.5)["fp8", "accuracy"] == "undecided"
    assert verdicts(results, max_accuracy_drop=60)["bad", "accuracy"] == "pass"
    assert verdicts(results, max_kl=0.03)["fp8", "KL"] == "undecided"
    assert verdicts(results, max_kl=0.01)["fp8", "KL"] == "fail"
    found = gate.checks(results, ReportSettings())
    assert gate.worst(found) == "fail"
    assert gate.engine_verdicts(found) == {"fp8": "pass", "bad": "fail"}
    assert gate.gate_sentence(found, ReportSettings()) == "Accuracy gate failed: bad (accuracy)."
    strict = ReportSettings(max_accuracy_drop=0.5)
    sentence = gate.gate_sentence(gate.checks(results, strict), strict)
    assert sentence.startswith(
        "Accuracy gate failed: bad (accuracy); undecided: fp8 (accuracy). To show that at most 0.5"
    )
    assert (found[1].measured, found[1].interval) == ("0.030", "0.020 to 0.040")
    assert found[2].measured == "−50.0"
    assert found[2].basis == "problems: 200, pairs: 200, gained: 0, lost: 100"


def test_none_of_three_right_on_both_sides_decides_nothing() -> None:
    results = Results([engine("bf16", [0] * 3), engine("fp8", [0] * 3, "fp8")])
    found = gate.checks(results, ReportSettings())
    assert [(check.verdict, check.measured) for check in found] == [("undecided", "0.0"), ("undecided", "–")]
    assert found[1].basis == "not measured"
    sentence = gate.gate_sentence(found, ReportSettings())
    assert sentence.startswith("Accuracy gate undecided: fp8 (accuracy), fp8 (KL). To show that at most 2 points are")
    assert "takes 98 problems or more" in sentence
    assert "No number of problems" in gate.gate_sentence(found, ReportSettings(max_accuracy_drop=0.0))


def test_a_single_bf16_engine_has_no_check_and_a_first_engine_in_fp8_has_one() -> None:
    assert gate.checks(Results([engine("bf16", [1])]), ReportSettings()) == []
    assert gate.gate_sentence([], ReportSettings()) == "Accuracy gate: nothing to compare."
    assert verdicts(Results([engine("fp8", [1], "fp8")], fidelity={"fp8": LOGITS})) == {("fp8", "KL"): "pass"}


def test_greedy_drafts_shall_not_change_a_text() -> None:
    plain = engine("fp8", [1, 0], "fp8", temperature=0.0)
    same = engine("fast", [1, 0], "fp8", "redrafter", temperature=0.0)
    other = engine("odd", [1, 1], "fp8", "redrafter", temperature=0.0)
    sampled = engine("warm", [1, 0], "fp8", "redrafter")
    found = gate.checks(Results([plain, same, other, sampled]), ReportSettings())
    texts = {check.engine: (check.measured, check.verdict) for check in found if check.check == "same text as fp8"}
    assert texts == {"fast": ("2/2", "pass"), "odd": ("1/2", "undecided")}


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_looser_limit_is_never_a_graver_verdict(low: float, high: float, limit: float) -> None:
    low, high = sorted((low, high))
    found = [gate.SEVERITY.index(gate.decide(low, high, allowed)) for allowed in (limit, limit + 0.1)]
    assert found[0] >= found[1]
    assert gate.decide(low, high, high) == "pass"


@pytest.mark.parametrize("drop", [0.2, 0.05, 0.02])
def test_the_least_number_of_problems_is_the_least(drop: float) -> None:
    least = gate.least_problems(drop)
    assert least is not None
    decided = [
        verdicts(Results([engine("a", [1] * n), engine("b", [1] * n)]), max_accuracy_drop=100 * drop)
        for n in (least - 1, least)
    ]
    assert [found["b", "accuracy"] for found in decided] == ["undecided", "pass"]


def test_the_plot_shows_intervals_and_limits() -> None:
    results = Results([engine("bf16", [1, 0, 1, 1]), engine("fp8", [1, 0, 0, 1], "fp8")], fidelity={"fp8": LOGITS})
    results.fidelity_texts = {"fp8": [{"kl": 0.02}, {"kl": 0.05}]}
    accuracy, divergence = plot_fidelity(results, ReportSettings(max_accuracy_drop=3.0, max_kl=0.1)).axes
    paired = results.paired(results.engines[1])
    assert paired is not None
    drawn = [list(line.get_xdata()) for line in accuracy.lines]
    assert drawn[:2] == [[100 * paired.low, 100 * paired.high], [-25.0]]
    assert [-3.0, -3.0] in drawn
    drawn = [list(line.get_xdata()) for line in divergence.lines]
    assert drawn == [[0.02, 0.05], [0.02, 0.04], [0.03], [0.1, 0.1]]


def test_engines_that_round_otherwise_have_a_divergence_of_their_own() -> None:
    right, greedy = [1, 0] * 10, {"temperature": 0.0}
    engines = [
        engine("bf16", right, **greedy),
        engine("cache", right, rounded={"kv_cache_dtype": "fp8"}, **greedy),
        engine("fp8", right, "fp8", **greedy),
        engine("whole", right, "fp8", rounded={"kv_cache_dtype": "fp8", "fp8_lm_head": True}, **greedy),
        engine("drafts", right, "fp8", "redrafter", rounded={"fp8_lm_head": True}, **greedy),
    ]
    assert [one.numerics for one in engines] == [
        "bf16",
        "bf16-kv_cache",
        "fp8",
        "fp8-kv_cache-lm_head",
        "fp8-lm_head",
    ]
    far = LOGITS | {"kl": 0.3, "kl_low": 0.2, "kl_high": 0.4}
    results = Results(engines, fidelity={"bf16-kv_cache": LOGITS, "fp8": LOGITS, "fp8-kv_cache-lm_head": far})
    found = gate.checks(results, ReportSettings())
    divergences = {check.engine: (check.verdict, check.measured) for check in found if check.check.startswith("KL")}
    assert divergences == {
        "cache": ("pass", "0.030"),
        "fp8": ("pass", "0.030"),
        "whole": ("fail", "0.30"),
        "drafts": ("undecided", "–"),
    }
    # No engine without drafts rounds like the one that drafts: its text may differ from all of theirs.
    assert not [check for check in found if check.check.startswith("same text")]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on greedy benchmarks: the chain's engines, and one with int8 weights and its logits error."""
    chain, folder = shared_chain(tmp_path_factory), tmp_path_factory.mktemp("greedy")
    (folder / "engines").mkdir()
    for name in ("problems", "engines/bf16", "engines/bf16-redrafter"):
        (folder / name).symlink_to(chain / name)
    model, problems, quantized = manifest(chain, "model"), manifest(chain, "problems"), manifest(folder, "int8_wo")
    quantize_model(QuantizeStage(precision="int8_wo", quantize=QuantizeSettings()), model, None, quantized, "cpu")
    row = EngineSettings(precision="int8_wo", max_num_seqs=4, max_model_len=160)
    build_engine(row, quantized, None, None, manifest(folder, "engines/int8"))
    wanted = FidelityStage(
        numerics=Numerics(precision="int8_wo"), fidelity=FidelitySettings(problems=3, max_tokens=20), prompt=Prompt()
    )
    logits = manifest(folder, "fidelity")
    compare_logits(wanted, model, quantized, problems, logits, "cpu")
    workload = SETTINGS.model_copy(update={"benchmark": SETTINGS.benchmark.model_copy(update={"temperature": 0.0})})
    benchmarks = [benchmark(folder, engine, workload) for engine in ("bf16", "bf16-redrafter", "int8")]
    make_report(ReportSettings(), benchmarks, None, None, [logits], None, manifest(folder, "report"))
    return folder / "report"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_real_engines_are_checked_line_by_line(greedy: Path) -> None:
    rows = rows_of(greedy / "gate.csv")
    assert [(row["engine"], row["check"], row["verdict"]) for row in rows] == [
        ("bf16-redrafter", "accuracy, points", "undecided"),
        ("bf16-redrafter", "same text as bf16", "pass"),
        ("int8", "accuracy, points", "undecided"),
        ("int8", "KL, nats a token", "pass"),
    ]
    # Two problems, one and three at once, twice: greedy drafts change no text.
    assert rows[1]["measured"] == "16/16"
    assert 0 < float(rows[3]["measured"]) < 0.05


def test_the_report_says_it_everywhere_and_hides_nothing(greedy: Path) -> None:
    assert read_manifest(greedy / "manifest.json")["gate"] == "undecided"
    assert "fidelity int8_wo" in read_manifest(greedy / "manifest.json")["inputs"]
    rows = rows_of(greedy / "benchmark.csv")
    assert [(row["engine"], row["gate"], row["kl"] != "") for row in rows[::2]] == [
        ("bf16", "", False),
        ("bf16-redrafter", "undecided", False),
        ("int8", "undecided", True),
    ]
    assert [row["accuracy_difference"] for row in rows[:3]] == ["", "", "0"]
    assert '<p class="banner undecided">Accuracy gate undecided: bf16-re' in (greedy / "overview.html").read_text()
    assert '<td class="undecided">undecided</td>' in (greedy / "gate.html").read_text()
    assert "| undecided |" in (greedy / "table1.md").read_text()
