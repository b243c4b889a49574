"""The tiny configuration from end to end: what a run leaves, what a second one does, and what a failed one says."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Workspace

from fourfold.artifacts import read_manifest

STAGES = [
    "model",
    "problems",
    "calibration",
    "quantize/fp8",
    "fidelity/fp8",
    "drafter/data",
    "drafter/checkpoint",
    "drafter/evaluation",
    "tuning/fp8-redrafter",
    *(f"{stage}/{engine}" for stage in ("engines", "benchmark") for engine in ("bf16", "fp8", "fp8-redrafter")),
    "overhead",
    "report",
]


@pytest.mark.parametrize("stage", STAGES)
def test_every_artifact_is_whole(finished: Workspace, stage: str) -> None:
    folder = finished.path / "results" / "tiny" / stage
    read_manifest(folder / "manifest.json")
    assert not list(folder.parent.glob(".*.partial"))


def test_logs_usage_and_configuration_lie_beside_the_results(finished: Workspace) -> None:
    results = finished.path / "results" / "tiny"
    for job in ("fetch_model", "train_drafter", "benchmark_engine/fp8-redrafter", "make_report"):
        assert (results / "logs" / f"{job}.log").stat().st_size > 0
        assert (results / "usage" / f"{job}.tsv").read_text().startswith("s\th:m:s\tmax_rss")
    config = json.loads((results / "config.json").read_text())
    assert list(config["engines"]) == ["bf16", "fp8", "fp8-redrafter"]


def test_snakemakes_report_shows_tables_and_plots(finished: Workspace) -> None:
    html = (finished.path / "results" / "tiny" / "report" / "report.html").read_text(encoding="utf-8")
    for caption in sorted((finished.path / "workflow" / "report").glob("*.rst")):
        words = caption.read_text(encoding="utf-8").split()[:4]
        assert " ".join(words) in html or caption.name == "workflow.rst", caption.name
    assert "<strong>tiny</strong>" in html, "the introduction names the experiment"


def test_a_report_can_be_made_by_hand(finished: Workspace, tmp_path: Path) -> None:
    run = finished.tiny("--report", tmp_path / "report.html")
    assert run.returncode == 0, run.output
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_a_second_run_does_nothing(finished: Workspace) -> None:
    run = finished.tiny()
    assert run.returncode == 0, run.output
    assert run.nothing_to_do


def test_a_failed_stage_says_why_and_leaves_the_rest(finished: Workspace, tmp_path: Path) -> None:
    workspace = finished.copy(tmp_path / "copy")
    engine = workspace.path / "results" / "tiny" / "engines" / "fp8" / "model.safetensors"
    times = engine.stat()
    engine.write_bytes(engine.read_bytes()[:-1])
    os.utime(engine, ns=(times.st_atime_ns, times.st_mtime_ns))
    for made_from_it in ("benchmark", "report"):
        shutil.rmtree(workspace.path / "results" / "tiny" / made_from_it)
    run = workspace.tiny(timeout=600)
    assert run.returncode == 1
    assert "engines/fp8/model.safetensors: has" in run.output
    assert "Traceback" not in run.output
    benchmarks = workspace.path / "results" / "tiny" / "benchmark"
    assert {path.parent.name for path in benchmarks.glob("*/manifest.json")} == {"bf16", "fp8-redrafter"}
