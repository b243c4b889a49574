"""A machine that refuses: no right to write, files in the way, full disks, too little memory, no GPU."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from refused import check_refusal, fourfold, old_artifact, snapshot
from tiny_chain import shared_chain

from fourfold.engine.memory import available_bytes
from fourfold.errors import refusal

TINY = json.dumps({"source": "tiny"})
BENCHMARK = json.dumps({"benchmark": {"problems": 1, "concurrency": [1], "max_tokens": 4}, "prompt": {}})


def fetch(output: Path) -> tuple[object, ...]:
    return ("fetch-model", "--settings", TINY, "--output", output)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    output = old_artifact(small_disk / "results" / "model")
    message = "results/model: No space left on device; free some space there, or write the results to a larger disk"
    check_refusal(small_disk, message, *fetch(output))


def test_a_full_disk_when_problems_are_written(small_disk: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"{i}? " + "x" * 2000, "solution": "s", "answer": "1"} for i in range(60)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": 40, "calibration": 1, "benchmark": 1}
    settings = json.dumps({"source": "local", "path": str(tmp_path / "p.jsonl"), "splits": splits})
    output = old_artifact(small_disk / "problems")
    check_refusal(
        small_disk, "No space left on device; free", "fetch-problems", "--settings", settings, "--output", output
    )


def test_a_disk_that_is_read_only(small_disk: Path) -> None:
    output = old_artifact(small_disk / "results" / "model")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = "this folder cannot be written to; make it writable or choose another place"
    check_refusal(small_disk, message, *fetch(output))
    check_refusal(small_disk, message, *fetch(small_disk / "other" / "model" / "manifest.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir(mode=0o500)
    check_refusal(tmp_path, "cannot be written to", *fetch(tmp_path / "results" / "model" / "manifest.json"))


def test_files_where_folders_belong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    message = "file: a file is where"
    for output in ("file/manifest.json", "file/model/manifest.json", "file/a/b/manifest.json"):
        check_refusal(tmp_path, message, *fetch(tmp_path / output))


def test_a_work_folder_that_is_a_file(tmp_path: Path) -> None:
    for name in ("target.json", "data.json", "work"):
        (tmp_path / name).write_text("{}")
    arguments = ["train-drafter", "--settings", "{}", "--output", tmp_path / "drafter" / "manifest.json"]
    arguments += ["--target", tmp_path / "target.json", "--data", tmp_path / "data.json"]
    for work in ("work", "work/training"):
        check_refusal(
            tmp_path, "work: a file is where a folder belongs; move it", *arguments, "--work", tmp_path / work
        )


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    output = tmp_path / "model" / "manifest.json"
    before = snapshot(tmp_path)
    for log, message in (("file/a.log", "(Not a directory|File exists)"), (".", "Is a directory")):
        check_refusal(tmp_path, f"{message}; move away what is there", "--log", tmp_path / log, *fetch(output))
    assert snapshot(tmp_path) == before


def test_an_output_that_is_no_manifest(tmp_path: Path) -> None:
    message = r"model\.json: an artifact is named by the path of its manifest\.json"
    check_refusal(tmp_path, message, *fetch(tmp_path / "model.json"))


@pytest.mark.parametrize("arguments", [["--target", "none.json"], []])
def test_a_missing_input_is_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    """What typer itself checks: its own words, and the exit code of a wrong command line."""
    code, text = fourfold("build-engine", "--settings", "{}", *arguments, "--output", tmp_path / "e" / "manifest.json")
    assert code == 2
    assert "--target" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("device", "message"),
    [
        pytest.param(
            "cuda",
            "PyTorch sees no NVIDIA GPU here; use --device cpu or auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("tpu", "device tpu: not known here; use auto, cpu or cuda"),
    ],
)
def test_a_device_that_is_not_there(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, device: str, message: str
) -> None:
    output = old_artifact(tmp_path / "benchmark")
    check_refusal(tmp_path, message, *benchmark(shared_chain(tmp_path_factory), output), "--device", device)


def benchmark(chain: Path, output: Path, engine: Path | None = None) -> tuple[object, ...]:
    engine = engine or chain / "engines" / "bf16" / "manifest.json"
    problems = chain / "problems" / "manifest.json"
    files = ("--engine", engine, "--problems", problems, "--output", output)
    return ("benchmark-engine", "--settings", BENCHMARK, *files)


def test_a_cache_beyond_the_memory(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    chain = shared_chain(tmp_path_factory)
    row = json.dumps({"precision": "bf16", "max_num_seqs": 10**9, "max_model_len": 160})
    engine = tmp_path / "engines" / "large" / "manifest.json"
    target = chain / "model" / "manifest.json"
    assert fourfold("build-engine", "--settings", row, "--target", target, "--output", engine)[0] == 0
    output = old_artifact(tmp_path / "benchmark")
    message = r"KV cache: 1000000000 slots .* x \d+ tokens .* GiB are free .*would fit"
    check_refusal(tmp_path, message, *benchmark(chain, output, engine))


def test_a_model_is_no_engine(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    chain = shared_chain(tmp_path_factory)
    message = "made by fetch_model; give the manifest that build_engine wrote"
    output = old_artifact(tmp_path / "benchmark")
    check_refusal(tmp_path, message, *benchmark(chain, output, chain / "model" / "manifest.json"))


def test_the_process_s_own_limit_counts_as_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        assert 0 <= available_bytes(torch.device("cpu")) <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_memory_that_runs_out_is_one_line(tmp_path: Path) -> None:
    """Under a limit that holds the program but not a model of 8 GB: a process of its own, as the limit stays."""
    large = json.dumps({"source": "tiny", "hidden_size": 16384, "num_hidden_layers": 2})
    code = (
        "import resource, sys, torch, transformers, psutil; from fourfold import cli\n"
        "from fourfold.model import tiny\n"
        "limit = psutil.Process().memory_info().vms + 2**30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); cli.run()"
    )
    command = [sys.executable, "-c", code, "fetch-model", "--settings", large]
    output = tmp_path / "model" / "manifest.json"
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "not enough memory; lower max_num_seqs, max_model_len or the batch sizes, or use a machine with more"
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_none_of_the_machine_s() -> None:
    assert refusal(FileNotFoundError(2, "No such file")) is None
    assert refusal(RuntimeError("shapes differ")) is None
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert str(refusal(error.value)).startswith("not enough memory")
