"""The rules around TensorRT-LLM, run to the engine with programs that stand in for Apptainer, the GPU and the builder.

TensorRT-LLM cannot be installed here. What is real: the model, its checkpoint for two GPUs, the guard, the rules, their
shells, the packing. What the stand-ins write is only laid out as trtllm-build's output is.
"""

import json
import os

from conftest import Workspace

ENGINES = "engines={fast: {precision: bf16, backend: tensorrt_llm, tensor_parallel_size: 2, max_model_len: 320}}"
ENGINE = "results/tiny/engines/fast"
CHECKPOINT = "results/tiny/tensorrt_llm/checkpoint/bf16-tp2"
PROGRAMS = {
    # Writes down how it was called, and runs what a container would run.
    "apptainer": """\
#!/bin/bash
case "$1" in
  --version) echo "apptainer version 1.4.2" ;;
  pull) echo "$@" >> "$(dirname "$0")/calls.txt"; touch "${@: -2:1}" ;;
  exec)
    echo "$@" >> "$(dirname "$0")/calls.txt"
    while [[ "$1" != *.simg ]]; do shift; done
    shift
    PYTHONPATH= exec "$@" ;;
esac
""",
    "nvidia-smi": "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n",
    "trtllm-build": """\
#!/usr/bin/env python3
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = json.loads(pathlib.Path(flags["--checkpoint_dir"], "config.json").read_text())
build = {key: int(flags[f"--{key}"]) for key in ("max_batch_size", "max_num_tokens", "max_seq_len")}
output = pathlib.Path(flags["--output_dir"])
for rank in range(model["mapping"]["tp_size"]):
    (output / f"rank{rank}.engine").write_text(f"rank {rank}")
config = {"version": "1.1.0rc0", "pretrained_config": model, "build_config": build}
(output / "config.json").write_text(json.dumps(config))
print("built")
""",
}


def stand_in(workspace: Workspace, version: str) -> dict[str, str]:
    """Puts the programs on PATH and a record of TensorRT-LLM beside the package; returns the environment."""
    folder = workspace.path / "bin"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    install(workspace, version)
    return {**workspace.environment, "PATH": os.pathsep.join([str(folder), workspace.environment["PATH"]])}


def install(workspace: Workspace, version: str) -> None:
    """What Python reads to tell TensorRT-LLM's version."""
    record = workspace.package.parent / "tensorrt_llm-0.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")


def test_an_engine_is_built_in_the_releases_container(workspace: Workspace) -> None:
    environment = stand_in(workspace, "1.3.0")
    options = ("--sdm", "apptainer", "--apptainer-args=--nv")
    run = workspace.tiny(f"{ENGINE}/manifest.json", *options, config=(ENGINES,), environment=environment)
    assert run.returncode == 1
    assert "error: TensorRT-LLM 1.3.0 has no engine builder any more" in run.output
    assert (workspace.path / CHECKPOINT / "rank1.safetensors").is_file()
    assert not (workspace.path / "results/tiny/tensorrt_llm/compiled/fast/config.json").exists()

    install(workspace, "1.1.0rc0")
    run = workspace.tiny(f"{ENGINE}/manifest.json", *options, config=(ENGINES,), environment=environment)
    assert run.returncode == 0, run.output
    assert run.jobs == {"compile_engine": 1, "pack_engine": 1}
    calls = (workspace.path / "bin" / "calls.txt").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["pull", "exec", "exec"]
    assert calls[0].endswith("docker://nvcr.io/nvidia/tensorrt-llm/release:1.1.0rc0")
    assert " --nv " in calls[2]
    assert f"trtllm-build --checkpoint_dir {CHECKPOINT}" in calls[2]
    engine = workspace.path / ENGINE
    assert json.loads((engine / "engine.json").read_text())["limits"]["max_seq_len"] == 320
    assert {file.name for file in engine.glob("rank*.engine")} == {"rank0.engine", "rank1.engine"}
    log = workspace.path / "results" / "tiny" / "logs" / "compile_engine" / "fast.log"
    assert log.read_text() == "built\n"
    again = workspace.tiny(f"{ENGINE}/manifest.json", "-n", *options, config=(ENGINES,), environment=environment)
    assert again.nothing_to_do, again.output
