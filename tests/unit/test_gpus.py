"""The allocator of GPUs, with a stand-in for the driver's list and real processes, some of them killed."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from snakemake.profiles import ProfileConfigFileParser

from fourfold.cli import program
from fourfold.errors import FourfoldError
from fourfold.profiles import gpus
from fourfold.profiles.gpus import TAKEN, VISIBLE, list_gpus, take_gpus, visible_gpus

CHECKOUT = Path(__file__).parents[2]
THREE = ["GPU-aa-1", "GPU-ab-2", "GPU-c-3"]
DIVIDED = """GPU 0: NVIDIA H100 (UUID: GPU-aa-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-GPU-x/1/0)
  MIG 3g.40gb     Device  1: (UUID: MIG-x-2)
GPU 1: NVIDIA H100 (UUID: GPU-ab-2)
"""


def stand_in(folder: Path, text: str, code: int = 0) -> None:
    """A command nvidia-smi that prints a list."""
    command = folder / "nvidia-smi"
    command.write_text(f'#!/bin/sh\n[ "$*" = -L ] || exit 64\ncat <<"END"\n{text}END\nexit {code}\n')
    command.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with three GPUs; returns the folder of its nvidia-smi."""
    stand_in(tmp_path, "".join(f"GPU {i}: NVIDIA H100 (UUID: {uuid})\n" for i, uuid in enumerate(THREE)))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    for name in (VISIBLE, TAKEN):
        # Set first, so that what a test makes of it is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def free() -> list[str]:
    """GPUs that nobody holds, as another process sees it: locks of one process do not share descriptors."""
    found = []
    for gpu in THREE:
        locks = gpus._try_locks([gpu], 1)
        found.extend(locks)
        for descriptor in locks.values():
            os.close(descriptor)
    return found


def test_gpus_are_listed_and_the_parts_of_those_that_are_divided(machine: Path) -> None:
    assert list_gpus() == THREE
    stand_in(machine, DIVIDED)
    assert list_gpus() == ["MIG-GPU-x/1/0", "MIG-x-2", "GPU-ab-2"]
    take_gpus()
    assert os.environ[VISIBLE] == "MIG-GPU-x/1/0"
    stand_in(machine, "Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    with pytest.raises(FourfoldError, match=r"nvidia-smi -L: Failed to initialize NVML: .*; repair the driver"):
        list_gpus()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, THREE),
        ("2,0", ["GPU-c-3", "GPU-aa-1"]),
        ("GPU-ab", ["GPU-ab-2"]),
        *((nothing, []) for nothing in ("", "-1", "NoDevFiles")),
    ],
)
def test_a_choice_from_outside_is_respected(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: list[str]
) -> None:
    if value is not None:
        monkeypatch.setenv(VISIBLE, value)
    assert visible_gpus() == expected
    take_gpus()
    assert os.environ.get(VISIBLE) == (expected[0] if expected else value)


@pytest.mark.parametrize("value", ["3", "GPU-a", "MIG-GPU-x/1/0"])
def test_a_gpu_that_is_not_there_is_one_line(machine: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VISIBLE, f"0,{value}")
    with pytest.raises(
        FourfoldError, match=rf"^CUDA_VISIBLE_DEVICES: no GPU {value} here; nvidia-smi -L lists GPU-aa-1"
    ):
        visible_gpus()


def test_several_gpus_are_taken_together_or_not_at_all(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_gpus(2)
    assert os.environ[VISIBLE] == "GPU-aa-1,GPU-ab-2"
    assert gpus._try_locks(THREE, 2) == {}
    assert free() == ["GPU-c-3"]
    # A child of this process has what its parent took.
    take_gpus()
    assert free() == ["GPU-c-3"]
    monkeypatch.delenv(TAKEN)
    monkeypatch.delenv(VISIBLE)
    with pytest.raises(FourfoldError, match="4 GPUs are needed, 3 can be used here"):
        take_gpus(4)


def test_a_command_keeps_its_gpus_until_it_is_killed(machine: Path) -> None:
    """Through the exec of `fourfold on-gpus`, as for torchrun; the locks' folder is the real one there."""
    code = (
        "import sys; from pathlib import Path; from fourfold import cli; from fourfold.profiles import gpus;"
        f"gpus.LOCKS = Path({str(machine / 'locks')!r}); sys.argv[1:] = ['on-gpus', '2', 'sh', '-c', "
        "'echo $CUDA_VISIBLE_DEVICES; exec sleep 60']; cli.run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "GPU-aa-1,GPU-ab-2\n"
        assert free() == ["GPU-c-3"]
        process.kill()
        process.wait()
    assert free() == THREE


def hold(events: Path, seconds: float) -> None:
    """What a forked process does: computes on a GPU for a while."""
    take_gpus()
    with events.open("a") as file:
        print(time.monotonic(), "take", os.getpid(), os.environ[VISIBLE], file=file, flush=True)
        time.sleep(seconds)
        print(time.monotonic(), "leave", os.getpid(), os.environ[VISIBLE], file=file, flush=True)


def read_events(events: Path) -> list[tuple[float, str, int, str]]:
    """Time, what happened, process and GPU, in the order of time."""
    lines = [line.split() for line in (events.read_text().splitlines() if events.exists() else [])]
    return sorted((float(at), what, int(pid), gpu) for at, what, pid, gpu in lines)


def test_processes_killed_at_random_never_share_a_gpu_and_leave_none_behind(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 processes, a third would compute for ever and is killed in the midst of it, some are killed at any time."""
    monkeypatch.setattr(gpus, "RETRY_SECONDS", 0.01)
    events, chance = machine / "events", random.Random(0)
    children: dict[int, float] = {}
    for number in range(60):
        seconds = chance.uniform(0.01, 0.05) if number % 3 else 600.0
        child = os.fork()
        if child == 0:
            try:
                hold(events, seconds)
            finally:
                os._exit(0)
        children[child] = seconds
    killed, codes = {}, {}
    doomed = chance.sample([child for child, seconds in children.items() if seconds < 1], 10)
    while len(codes) < len(children):
        endless = [pid for _, what, pid, _ in read_events(events) if what == "take" and children[pid] > 1]
        for child in [*endless, *(doomed[:1] if chance.random() < 0.2 else [])]:
            if child not in killed and child not in codes:
                killed[child] = time.monotonic()
                os.kill(child, signal.SIGKILL)
        doomed = [child for child in doomed if child not in killed]
        for child in children.keys() - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    assert set(codes.values()) == {0, -signal.SIGKILL}

    lines = read_events(events)
    left = {pid: at for at, what, pid, _ in lines if what == "leave"}
    takers = [(gpu, at, left.get(pid, killed.get(pid, 0.0)), pid) for at, what, pid, gpu in lines if what == "take"]
    assert len([pid for *_, pid in takers if pid not in left]) >= 20, "those that would compute for ever"
    assert {gpu for gpu, *_ in takers} == set(THREE)
    for (gpu, _, end, _), (other, begin, _, _) in pairwise(sorted(takers)):
        assert gpu != other or end <= begin
    assert free() == THREE


def test_without_a_gpu_nothing_is_taken_but_one_that_was_given_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    assert program.take_gpu("auto") == "auto"
    assert VISIBLE not in os.environ
    assert not gpus.LOCKS.exists()
    # As Slurm does for a job with a GPU.
    monkeypatch.setenv(VISIBLE, "0")
    with pytest.raises(
        FourfoldError, match=r"CUDA_VISIBLE_DEVICES=0 gives .* PyTorch sees none: .*FOURFOLD_DEVICE=cpu"
    ):
        program.take_gpu("auto")
    assert program.take_gpu("cpu") == "cpu"


def read_profile(name: str) -> dict[str, object]:
    with (CHECKOUT / "profiles" / name / "profile.yaml").open() as file:
        return dict(ProfileConfigFileParser().parse(file))


def test_the_local_profile_runs_a_stage_for_each_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    profile = read_profile("local")
    assert (profile["resources"], profile["max-threads"]) == (["machine=3"], "16")
    monkeypatch.setenv(VISIBLE, "1")
    one = read_profile("local")
    assert (one["resources"], one.get("max-threads")) == (["machine=1"], None)
    monkeypatch.setenv(VISIBLE, "")
    none = read_profile("local")
    assert none == one
    assert "set-resources" not in none, "nothing asks for a GPU"
