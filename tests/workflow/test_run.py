"""The tiny configuration from end to end: what a run leaves, what a second one does, and how a killed one goes on."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Workspace, tiny_options

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
    *(f"{stage}/{engine}" for stage in ("engines", "benchmark") for engine in ("bf16", "fp8", "fp8-redrafter")),
    "report",
]
FASTER_LEARNING = "drafter={training: {learning_rate: 0.002}}"
AFTER_TRAINING = {
    "train_drafter": 1,
    "evaluate_drafter": 1,
    "build_engine": 1,
    "benchmark_engine": 1,
    "make_report": 1,
}
CHANGES = {
    FASTER_LEARNING: AFTER_TRAINING,
    "drafter={data: {max_tokens: 23}}": {"generate_drafter_data": 1, **AFTER_TRAINING},
    "fidelity={max_tokens: 15}": {"compare_logits": 1, "make_report": 1},
    "drafter={evaluation: {max_tokens: 15}}": {"evaluate_drafter": 1, "make_report": 1},
    "quantize={batch_size: 1}": {
        "quantize_model": 1,
        "compare_logits": 1,
        "generate_drafter_data": 1,
        **AFTER_TRAINING,
        "build_engine": 2,
        "benchmark_engine": 2,
    },
    "engines={fp8-redrafter: {beam_length: 3}}": {"build_engine": 1, "benchmark_engine": 1, "make_report": 1},
    "engines={more: {precision: bf16}}": {"build_engine": 1, "benchmark_engine": 1, "make_report": 1},
    "benchmark={temperature: 0.5}": {"benchmark_engine": 3, "make_report": 1},
    "report={title: Other}": {"make_report": 1},
}


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


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reruns_what_depends_on_it(finished: Workspace, change: str) -> None:
    run = finished.tiny("-n", config=(change,))
    assert run.returncode == 0, run.output
    assert run.jobs == CHANGES[change]


EDITS = {
    "report/verdict.py": {"make_report": 1},
    "drafter/train.py": AFTER_TRAINING,
    "benchmark/workload.py": {"benchmark_engine": 3, "make_report": 1},
    "config/benchmark.py": {},
    "progress.py": {},
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_reruns_the_stages_that_run_it(finished: Workspace, tmp_path: Path, file: str) -> None:
    workspace = finished.copy(tmp_path / "copy")
    with (workspace.package / file).open("a", encoding="utf-8") as source:
        source.write("\nEDITED = True\n")
    assert workspace.tiny("-n").jobs == EDITS[file]


def test_a_comment_reruns_nothing(finished: Workspace, tmp_path: Path) -> None:
    workspace = finished.copy(tmp_path / "copy")
    for path in workspace.package.rglob("*.py"):
        with path.open("a", encoding="utf-8") as source:
            source.write("\n# edited\n")
    assert workspace.tiny("-n").nothing_to_do


def test_a_killed_run_goes_on(finished: Workspace, tmp_path: Path) -> None:
    """Killed while it trains, with all its children, a run leaves no drafter; the next one makes what is missing."""
    workspace = finished.copy(tmp_path / "copy")
    results = workspace.path / "results" / "tiny"
    log, manifest = results / "logs" / "train_drafter.log", results / "drafter" / "checkpoint" / "manifest.json"
    log.unlink()
    with subprocess.Popen(
        workspace.command(*tiny_options(FASTER_LEARNING)),
        cwd=workspace.path,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not log.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert not manifest.exists()
    locked = workspace.tiny(config=(FASTER_LEARNING,))
    assert locked.returncode == 1
    assert "--unlock" in locked.output
    assert workspace.tiny("--unlock", config=(FASTER_LEARNING,)).returncode == 0
    run = workspace.tiny(config=(FASTER_LEARNING,), timeout=600)
    assert run.returncode == 0, run.output
    assert run.jobs == AFTER_TRAINING
    assert read_manifest(manifest)["settings"]["training"]["learning_rate"] == 0.002
    assert workspace.tiny(config=(FASTER_LEARNING,)).nothing_to_do


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
