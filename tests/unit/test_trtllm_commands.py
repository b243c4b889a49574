"""What TensorRT-LLM is called with, the guard before it, and what becomes of its output."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from refused import fourfold
from tiny_trtllm import make_drafter

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.config import load_config
from fourfold.config.engine import EngineSettings
from fourfold.config.model import TinyModel
from fourfold.config.stages import ConvertStage, MergeStage, TensorrtLlmStage
from fourfold.config.trtllm import TensorrtLlmSettings
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.model.tokenizer import load_tokenizer
from fourfold.trtllm import guard
from fourfold.trtllm.commands import BACKEND, build_command, guard_arguments, image, serve_command
from fourfold.trtllm.convert import convert_checkpoint
from fourfold.trtllm.merge import merge_drafter
from fourfold.trtllm.pack import pack_engine
from fourfold.trtllm.serve import engine_command, serve_engine

RECIPE = load_config(Path(__file__).parents[2] / "config" / "openmath-14b.yaml")
ROW = RECIPE.engines["fp8-redrafter"]


def test_the_recipes_build() -> None:
    command = build_command(ROW, RECIPE.tensorrt_llm, Path("checkpoint"), Path("engine"))
    assert command[0] == "trtllm-build"
    assert dict(zip(command[1::2], command[2::2], strict=True)) == {
        "--checkpoint_dir": "checkpoint",
        "--output_dir": "engine",
        "--gemm_plugin": "fp8",
        "--use_paged_context_fmha": "enable",
        "--max_batch_size": "32",
        "--max_seq_len": "32000",
        "--max_input_len": "32000",
        "--max_num_tokens": "32000",
        "--speculative_decoding_mode": "explicit_draft_tokens",
        "--max_beam_width": "1",
        "--kv_cache_type": "paged",
        "--output_timing_cache": "engine/model.cache",
    }


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_without_a_drafter_nothing_speculates(name: str) -> None:
    command = build_command(RECIPE.engines[name], RECIPE.tensorrt_llm, "checkpoint", "engine")
    assert "--speculative_decoding_mode" not in command
    assert command[command.index("--gemm_plugin") + 1] == "auto"


def test_the_recipes_server() -> None:
    command = serve_command(ROW, RECIPE.tensorrt_llm, "engine", port=5000)
    assert command[:3] == ["trtllm-serve", "serve", "engine"]
    assert dict(zip(command[3::2], command[4::2], strict=True)) == {
        "--tokenizer": "engine",
        "--backend": "trt",
        "--tp_size": "2",
        "--kv_cache_free_gpu_memory_fraction": "0.92",
        "--max_batch_size": "32",
        "--max_num_tokens": "32000",
        "--host": "127.0.0.1",
        "--port": "5000",
    }


@pytest.mark.parametrize(("version", "name"), [("1.1.0rc0", "trt"), ("1.1.0", "tensorrt"), ("1.2.1", "tensorrt")])
def test_each_release_has_its_name_for_the_backend(version: Any, name: str) -> None:
    settings = TensorrtLlmSettings(version=version, max_num_tokens=4096)
    command = serve_command(ROW, settings, "engine")
    assert command[command.index("--backend") + 1] == name
    assert command[command.index("--max_num_tokens") + 1] == "4096"
    assert image(version) == f"docker://nvcr.io/nvidia/tensorrt-llm/release:{version}"


def test_every_release_that_may_be_chosen_has_one() -> None:
    allowed = TensorrtLlmSettings.model_json_schema()["properties"]["version"]["enum"]
    assert sorted(allowed) == sorted(BACKEND)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(machine: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, *programs: str) -> None:
    """Makes a version of TensorRT-LLM look installed, with some of its programs."""

    def found(name: str) -> str:
        assert name == "tensorrt_llm"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    for program in programs:
        (machine / program).write_text("#!/bin/sh\n")
        (machine / program).chmod(0o755)


@pytest.mark.parametrize(
    ("version", "programs", "message"),
    [
        (None, (), r"TensorRT-LLM 1\.1\.0rc0 is not installed here; use its container"),
        ("1.1.0", ("trtllm-build",), r"TensorRT-LLM 1\.1\.0 is installed here, tensorrt_llm\.version is 1\.1\.0rc0"),
        ("1.3.0rc20", ("trtllm-build",), r"1\.3\.0rc20 is installed here"),
        ("1.3.0rc21", ("trtllm-build",), r"1\.3\.0rc21 has no engine builder any more"),
        ("1.3.0", ("trtllm-build",), r"1\.3\.0 has no engine builder any more"),
        ("2.0.0rc1", ("trtllm-build",), "has no engine builder any more"),
        ("unknown", ("trtllm-build",), "not a version that is known here"),
        ("1.1.0rc0", (), "trtllm-build is not on PATH"),
    ],
)
def test_a_wrong_release_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, programs: tuple[str, ...], message: str
) -> None:
    install(machine, monkeypatch, version, *programs)
    with pytest.raises(FourfoldError, match=message):
        guard.check_version("1.1.0rc0")


def test_the_right_release_passes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch, "1.1.0rc0", "trtllm-build")
    guard.check_version("1.1.0rc0")


@pytest.mark.parametrize(
    ("gpu", "precision", "drafts", "message"),
    [
        ("NVIDIA A100-SXM4-80GB, 8.0", "fp8", False, "A100-SXM4-80GB has compute capability 8.0, .*use precision int8"),
        ("NVIDIA B200, 10.0", "int8_wo", False, "precision int8_wo: NVIDIA B200 has compute capability 10.0"),
        ("Tesla T4, 7.5", "bf16", True, "8.0 or higher for a ReDrafter"),
        ("", "bf16", False, "nvidia-smi names no GPU here"),
        ("NVIDIA H100 80GB HBM3, 9.0\nNVIDIA A100, 8.0", "fp8", False, "NVIDIA A100 has compute capability 8.0"),
        ("NVIDIA H100 80GB HBM3, 9.0\nNVIDIA H100 80GB HBM3, 9.0", "fp8", True, None),
        ("NVIDIA L4, 8.9", "fp8", False, None),
        ("NVIDIA A100-SXM4-80GB, 8.0", "int8_wo", True, None),
        ("NVIDIA GeForce RTX 5090, 12.0", "int8_wo", False, None),
    ],
)
def test_the_gpu_must_fit_the_precision(
    machine: Path, gpu: str, precision: str, drafts: bool, message: str | None
) -> None:
    """nvidia-smi's own words for two GPUs, one a line."""
    (machine / "nvidia-smi").write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <<'END'\n{gpu}\nEND\n")
    (machine / "nvidia-smi").chmod(0o755)
    if message is None:
        guard.check_gpu(precision, drafts)
    else:
        with pytest.raises(FourfoldError, match=message):
            guard.check_gpu(precision, drafts)


def test_no_driver_is_no_gpu(machine: Path) -> None:
    with pytest.raises(FourfoldError, match="nvidia-smi names no GPU here"):
        guard.check_gpu("bf16", drafts=False)


def test_sequences_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    guard.check_length(tmp_path, 512)
    with pytest.raises(FourfoldError, match="max_model_len is 513, more than the 512 positions"):
        guard.check_length(tmp_path, 513)


def test_the_guard_needs_python_alone(tmp_path: Path) -> None:
    """It runs in a container that has nothing of this environment: here, a Python without site-packages."""
    package = str(Path(guard.__file__).parents[2])
    arguments = guard_arguments(ROW, RECIPE.tensorrt_llm)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "fourfold.trtllm.guard", *arguments],
        env={"PATH": os.defpath, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: TensorRT-LLM 1.1.0rc0 is not installed here; ")
    assert done.stderr.count("\n") == 1


SMALL = EngineSettings(
    precision="bf16", backend="tensorrt_llm", tensor_parallel_size=2, max_num_seqs=4, max_model_len=256
)
STAGE = TensorrtLlmStage(engine=SMALL, tensorrt_llm=TensorrtLlmSettings())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    fetch_model(TinyModel(source="tiny"), folder / "model" / "manifest.json")
    output = folder / "bf16-tp2" / "manifest.json"
    convert_checkpoint(
        ConvertStage(precision="bf16", tensor_parallel_size=2), folder / "model" / "manifest.json", output
    )
    return output


def compiled(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """Files in the layout of trtllm-build's output; what is in the engines does not matter here."""
    folder.mkdir()
    build = {"max_batch_size": 4, "max_num_tokens": 256, "max_seq_len": 256} | changes.pop("build", {})
    model = json.loads((checkpoint.parent / "config.json").read_text()) | changes.pop("model", {})
    config = {"version": "1.1.0rc0", "pretrained_config": model, "build_config": build} | changes
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        (folder / f"rank{rank}.engine").write_bytes(b"engine of a rank")
    return folder / "config.json"


def test_a_packed_engine_has_all_that_serving_needs(checkpoint: Path, tmp_path: Path) -> None:
    config = compiled(tmp_path / "compiled", checkpoint, build={"max_num_tokens": 512})
    output = tmp_path / "engines" / "small" / "manifest.json"
    pack_engine(STAGE, checkpoint, config, output)
    manifest = read_manifest(output, "build_engine")
    assert manifest["settings"] == SMALL.model_dump()
    assert set(manifest["files"]) >= {"config.json", "rank0.engine", "rank1.engine", "engine.json", "tokenizer.json"}
    assert (output.parent / "rank1.engine").samefile(tmp_path / "compiled" / "rank1.engine")
    assert load_tokenizer(output.parent).chat_template
    engine = json.loads((output.parent / "engine.json").read_text())
    assert engine["limits"] == {"max_batch_size": 4, "max_num_tokens": 512, "max_seq_len": 256}
    assert engine["model"]["num_hidden_layers"] == 2
    assert engine["end_token_ids"] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.2.1"}, "version is 1.2.1, 1.1.0rc0 was asked for"),
        ({"model": {"mapping": {"tp_size": 4}}}, "tp_size is 4, 2 was asked for"),
        ({"model": {"redrafter_num_beams": 2, "redrafter_draft_len_per_beam": 3}}, "2 beams of 3 drafts, 0 of 0 were"),
        ({"build": {"max_batch_size": 2}}, "max_batch_size is 2, less than the 4 that was asked for"),
        ({"build": {"max_num_tokens": 128}}, "max_num_tokens is 128, less than the 256"),
        ({"build": None}, "no engine's configuration"),
    ],
)
def test_an_engine_that_was_not_asked_for_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes == {"build": None}:
        config = compiled(tmp_path / "compiled", checkpoint, build_config=None)
    else:
        config = compiled(tmp_path / "compiled", checkpoint, **changes)
    with pytest.raises(FourfoldError, match=message):
        pack_engine(STAGE, checkpoint, config, tmp_path / "engines" / "small" / "manifest.json")
    assert not (tmp_path / "engines" / "small").exists()


def test_a_rank_without_an_engine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = compiled(tmp_path / "compiled", checkpoint)
    config.with_name("rank1.engine").unlink()
    with pytest.raises(FourfoldError, match=r"rank1\.engine: is missing or empty"):
        pack_engine(STAGE, checkpoint, config, tmp_path / "engines" / "small" / "manifest.json")


@pytest.fixture
def packed(checkpoint: Path, tmp_path: Path) -> Path:
    output = tmp_path / "engines" / "small" / "manifest.json"
    pack_engine(STAGE, checkpoint, compiled(tmp_path / "compiled", checkpoint), output)
    return output.parent


def test_an_installed_server_is_run_as_it_is(packed: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch, "1.1.0rc0", "trtllm-serve", "apptainer")
    command = engine_command(packed, "127.0.0.1", 8123)
    assert command == serve_command(SMALL, TensorrtLlmSettings(), packed, "127.0.0.1", 8123)


def test_without_it_the_container_is(packed: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch, None, "apptainer")
    command = engine_command(packed, "127.0.0.1", 8123)
    assert command[:5] == [str(machine / "apptainer"), "exec", "--nv", "--bind", str(packed)]
    assert command[5:8] == ["docker://nvcr.io/nvidia/tensorrt-llm/release:1.1.0rc0", "trtllm-serve", "serve"]


def test_without_either_serving_is_one_line(packed: Path, machine: Path) -> None:
    code, text = fourfold("serve", packed)
    assert code == 1
    assert text.splitlines()[-1].startswith("error: TensorRT-LLM 1.1.0rc0 is not installed here; use its container")


def test_serve_becomes_the_server(packed: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name prints what it was called with, in place of the real one."""
    (machine / "apptainer").write_text('#!/bin/sh\necho "$@"\n')
    (machine / "apptainer").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "fourfold.cli", "serve", str(packed), "--port", "8124"],
        env={**os.environ, "PATH": str(machine)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = engine_command(packed, "127.0.0.1", 8124)[1:]
    assert done.stdout.split() == expected


@pytest.mark.parametrize(("host", "api_key"), [("127.0.0.1", "secret"), ("0.0.0.0", None)])
def test_what_its_server_cannot_keep_out_is_refused(packed: Path, host: str, api_key: str | None) -> None:
    with pytest.raises(FourfoldError, match="trtllm-serve knows no keys"):
        serve_engine(packed, host, 8000, api_key)


def test_more_drafts_than_were_trained_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    drafter = make_drafter(tmp_path / "made", vocab_size=512)
    manifest = tmp_path / "drafter" / "manifest.json"
    with write_artifact(manifest, stage="train_drafter", settings={}) as staging:
        for file in drafter.iterdir():
            (staging.path / file.name).write_bytes(file.read_bytes())
        staging.facts["predict_tokens"] = 3
    settings = {"tensor_parallel_size": 2, "redrafter_num_beams": 1, "redrafter_greedy_search": True}
    output = tmp_path / "merged" / "manifest.json"
    with pytest.raises(FourfoldError, match=r"is 4, but .* was trained for 3 drafts; lower beam_length to 4 or raise"):
        merge_drafter(MergeStage(**settings, redrafter_draft_len_per_beam=4), checkpoint, manifest, output)
    merge_drafter(MergeStage(**settings, redrafter_draft_len_per_beam=3), checkpoint, manifest, output)
    merged = read_manifest(output, "merge_drafter")
    assert merged["model"] == read_manifest(checkpoint)["model"]
    assert (output.parent / "tokenizer" / "tokenizer.json").is_file()
