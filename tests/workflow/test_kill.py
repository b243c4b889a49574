"""`kill -9` at any moment, and a full disk: nothing looks whole that is not, and the next run ends as if undisturbed.

Stages are run by the commands that Snakemake runs, each a fork of a process that has imported the package.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Workspace, tiny_options
from fork_server import ForkServer

from fourfold.artifacts.files import read_jsonl, sha256_file

STAGE_MODULES = ("model", "problems", "calibration", "quantize", "fidelity", "tuning", "benchmark", "report")
PRELOAD = [
    *(f"fourfold.{stage}.stage" for stage in STAGE_MODULES),
    *("fourfold.drafter.data", "fourfold.drafter.train", "fourfold.drafter.evaluate", "fourfold.engine.build"),
    *("fourfold.model.tiny", "fourfold.quantize.fp8", "modelopt.torch.export", "matplotlib.backends.backend_svg"),
]
MEASURED = {
    "benchmark-engine": (
        "manifest.json",
        "benchmark.csv",
        "rates.csv",
        "bench_serve.jsonl",
        "workloads.csv",
        "requests.jsonl",
    ),
    "tune-engine": ("manifest.json", "plan.json", "search.csv"),
}
"""Files that hold times, or rest on them."""
Contents = dict[str, object]


@dataclass
class Stage:
    """A stage's command in a finished run, and what one undisturbed run of it makes."""

    server: ForkServer
    place: Path
    command: list[str]

    def option(self, name: str) -> Path | None:
        """The file or folder that an option of the command names."""
        return self.place / self.command[self.command.index(name) + 1] if name in self.command else None

    @property
    def artifact(self) -> Path:
        """The directory that it writes."""
        output = self.option("--output")
        assert output is not None
        return output.parent

    @property
    def output(self) -> Path:
        """What the last run printed."""
        return self.place / "output"

    def on(self, disk: Path) -> "Stage":
        """The same stage, with everything that it writes on another disk."""
        command = list(self.command)
        for name in {"--output", "--work", "--log"} & set(command):
            place = command.index(name) + 1
            command[place] = str(disk / command[place])
        return Stage(self.server, self.place, command)

    def run(self, kill_at: int | None = None, kill_after: float | None = None) -> int:
        """Runs it; returns the return code."""
        return self.server.run(self.command, self.place, self.output, kill_at=kill_at, kill_after=kill_after)

    def contents(self) -> Contents:
        """Hash of each file of the artifact but its provenance; of measured ones what does not depend on time."""
        contents: Contents = {name: sha256_file(self.artifact / name) for name in names(self.artifact)}
        del contents["provenance.json"]
        for name in MEASURED.get(self.command[2], ()):
            contents[name] = "measured"
        if self.command[2] == "benchmark-engine":
            rows = read_jsonl(self.artifact / "requests.jsonl")
            contents["answers"] = [[row[key] for key in ("problem_id", "seed", "text", "correct")] for row in rows]
        return contents

    def leftovers(self) -> list[Path]:
        """Everything that only an unfinished run may leave."""
        work = self.option("--work")
        return [*self.artifact.parent.glob(".*"), *self.artifact.rglob(".*"), *(work.rglob("*") if work else ())]

    def looks_whole(self) -> bool:
        """Whether the artifact is in its place; fails if it is there but not as its manifest says."""
        if not self.artifact.exists():
            return False
        files = json.loads((self.artifact / "manifest.json").read_text())["files"]
        assert {name: sha256_file(self.artifact / name) for name in files} == {
            name: facts["sha256"] for name, facts in files.items()
        }
        assert set(names(self.artifact)) == {*files, "manifest.json", "provenance.json"}
        return True


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("fourfold.cli:run", *PRELOAD) as server:
        yield server


@pytest.fixture(scope="module")
def place(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return finished.copy(tmp_path_factory.mktemp("kill") / "checkout")


@pytest.fixture(scope="module")
def stages(server: ForkServer, place: Workspace) -> dict[str, Stage]:
    """The stages by their command; of several engines, the one that drafts."""
    commands = re.findall(r"Shell command: fourfold (.*)", place.tiny("-n", "--forceall").output)
    found = {}
    for command in map(shlex.split, commands):
        name = command[2]
        if name == "train-drafter":
            # Saved after every step, so that there is something to resume from.
            settings = command.index("--settings") + 1
            values = json.loads(command[settings])
            values["training"]["checkpoint_minutes"] = 1e-9
            command[settings] = json.dumps(values)
        if name not in found or "fp8-redrafter" in command[-1]:
            found[name] = Stage(server, place.path, command)
    return found


STRIDES = {
    "fetch-model": 10,
    "fetch-problems": 2,
    "build-calibration": 4,
    "quantize-model": 9,
    "compare-logits": 4,
    "generate-drafter-data": 2,
    "train-drafter": 3,
    "evaluate-drafter": 3,
    "tune-engine": 8,
    "build-engine": 2,
    "benchmark-engine": 100,
    "make-report": 20,
}
"""Which share of a stage's steps is tried: some stages take a quarter of a second, others several."""


def step_count(stage: Stage) -> int:
    """Runs a stage; how many steps changed a file."""
    assert stage.run() == 0, stage.output.read_text()
    return int(stage.output.with_name("output.steps").read_text())


@pytest.mark.parametrize("name", STRIDES)
def test_killed_at_a_step_it_is_made_as_if_undisturbed(stages: dict[str, Stage], name: str, tmp_path: Path) -> None:
    """Steps are those that change a file, from the first to the last, the renames at the end among them.

    Half of the runs find an older artifact in the place; the others none, as in Snakemake, which deletes it before.
    """
    stage = stages[name]
    last = step_count(stage)
    contents = stage.contents()
    older = shutil.copytree(stage.artifact, tmp_path / "older")
    shutil.rmtree(stage.artifact)
    last_without = step_count(stage)
    for number, step in enumerate([*range(1, last, STRIDES[name]), last_without, last]):
        shutil.rmtree(stage.artifact)
        if step > last_without or number % 2:
            shutil.copytree(older, stage.artifact)
        assert stage.run(kill_at=step) == -signal.SIGKILL, stage.output.read_text()
        assert not stage.looks_whole() or stage.contents() == contents
        assert stage.run() == 0, stage.output.read_text()
        assert_undisturbed(stage, contents)


def assert_undisturbed(stage: Stage, contents: Contents) -> None:
    """Nothing tells the artifact from one that was made in one go, and nothing else is left."""
    assert stage.looks_whole()
    assert stage.contents() == contents
    assert stage.leftovers() == []


@pytest.mark.parametrize("name", ["quantize-model", "generate-drafter-data", "train-drafter"])
def test_killed_at_any_time_it_is_made_as_if_undisturbed(stages: dict[str, Stage], name: str) -> None:
    """One kill after another, so that each run starts with what several before it left."""
    stage = stages[name]
    begin = time.monotonic()
    assert stage.run() == 0, stage.output.read_text()
    seconds = time.monotonic() - begin
    contents = stage.contents()
    shutil.rmtree(stage.artifact)
    chance = random.Random(0)
    codes = []
    for share in sorted(chance.uniform(0, 0.7) for _ in range(5)):
        codes.append(stage.run(kill_after=share * seconds))
        assert not stage.looks_whole() or stage.contents() == contents
    # What resumes may end before a late kill.
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert stage.run() == 0, stage.output.read_text()
    assert_undisturbed(stage, contents)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, to be filled."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs a tmpfs of its own, and mount says: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("name", STRIDES)
def test_a_full_disk_is_one_line(stages: dict[str, Stage], small_disk: Path, name: str) -> None:
    """Full at once, and full when a part of the artifact is written; with room again, the stage ends."""
    stage = stages[name].on(small_disk)
    assert stage.run() == 0, stage.output.read_text()
    contents = stage.contents()
    size = sum(path.stat().st_size for path in stage.artifact.rglob("*"))
    shutil.rmtree(stage.artifact)
    for share in (0, 0.6):
        with filled(small_disk, int(share * size)):
            code = stage.run()
        output = stage.output.read_text()
        assert code == 1, output
        (error,) = (line for line in output.splitlines() if line.startswith("error:"))
        assert error.startswith(f"error: {stage.artifact}: No space left on device; free some space there"), output
        assert "Traceback" not in output
        assert not stage.artifact.exists()
    assert stage.run() == 0, stage.output.read_text()
    assert_undisturbed(stage, contents)
    shutil.rmtree(stage.artifact)


@contextmanager
def filled(disk: Path, rest: int) -> Iterator[None]:
    """Leaves at most so many bytes on a disk."""
    facts, filler = os.statvfs(disk), disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (facts.f_bavail - rest // facts.f_frsize) * facts.f_frsize)
    yield
    filler.unlink()


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_snakemake_killed_alone_leaves_its_job_running(finished: Workspace, tmp_path: Path) -> None:
    """The next run refuses to mix its files with that job's; once that has ended, it makes the same drafter again."""
    workspace = finished.copy(tmp_path / "copy")
    drafter = workspace.path / "results" / "tiny" / "drafter" / "checkpoint"
    target, partial = (
        str((drafter / "manifest.json").relative_to(workspace.path)),
        drafter.parent / ".checkpoint.partial",
    )
    shutil.rmtree(drafter)
    with subprocess.Popen(
        workspace.command(target, *tiny_options()),
        cwd=workspace.path,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not partial.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        job = [number for number in processes_in(workspace.path) if number != process.pid]
        for number in job:
            os.kill(number, signal.SIGSTOP)
        process.kill()
    assert "--unlock" in workspace.tiny(target).output
    assert workspace.tiny("--unlock").returncode == 0
    refused = workspace.tiny(target)
    assert refused.returncode == 1
    assert re.search(
        r"error: results/tiny/drafter/\.checkpoint\.partial: another process is writing it", refused.output
    )
    assert not drafter.exists()
    for number in job:
        os.kill(number, signal.SIGKILL)
    run = workspace.tiny(target)
    assert run.returncode == 0, run.output
    assert run.jobs == {"train_drafter": 1}
    for name in names(drafter):
        assert (drafter / name).read_bytes() == (
            finished.path / drafter.relative_to(workspace.path) / name
        ).read_bytes()
    assert not partial.exists()
    assert workspace.tiny("-n").nothing_to_do
