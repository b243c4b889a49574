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
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Workspace, tiny_options
from fork_server import ForkServer

from fourfold.artifacts.files import read_jsonl, sha256_file

PRELOAD = [
    *(f"fourfold.{stage}.stage" for stage in ("model", "problems", "calibration", "quantize", "benchmark", "report")),
    *("fourfold.drafter.data", "fourfold.drafter.train", "fourfold.drafter.evaluate", "fourfold.engine.build"),
    *("fourfold.model.tiny", "fourfold.quantize.fp8"),
]
MEASURED = ("manifest.json", "benchmark.csv", "workloads.csv", "requests.jsonl")
"""Files of a benchmark that hold times."""
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

    def start(self, kill_at: int | None = None) -> int:
        """Starts it; returns the process id."""
        return self.server.start(self.command, self.place, self.output, kill_at=kill_at)

    def run(self, kill_at: int | None = None) -> int:
        """Runs it; returns the return code."""
        self.start(kill_at)
        return self.server.wait()

    def contents(self) -> Contents:
        """Hash of each file of the artifact; of measured ones what does not depend on time."""
        contents: Contents = {name: sha256_file(self.artifact / name) for name in names(self.artifact)}
        if "benchmark-engine" in self.command:
            for name in MEASURED:
                del contents[name]
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


STAGES = [
    "fetch-model",
    "fetch-problems",
    "build-calibration",
    "quantize-model",
    "generate-drafter-data",
    "train-drafter",
    "evaluate-drafter",
    "build-engine",
    "benchmark-engine",
    "make-report",
]


def step_count(stage: Stage) -> int:
    """Runs a stage; how many steps changed a file."""
    assert stage.run() == 0, stage.output.read_text()
    return int(stage.output.with_name("output.steps").read_text())


@pytest.mark.parametrize("name", STAGES)
def test_killed_at_a_step_it_is_made_as_if_undisturbed(stages: dict[str, Stage], name: str, tmp_path: Path) -> None:
    """Steps are those that change a file: the first, some on the way, and all of the last ones, renames included.

    Half of them with an older artifact in the place, half without, as Snakemake runs stages.
    """
    stage = stages[name]
    last = step_count(stage)
    contents = stage.contents()
    older = shutil.copytree(stage.artifact, tmp_path / "older")
    shutil.rmtree(stage.artifact)
    last_without = step_count(stage)
    begin = time.monotonic()
    chance = random.Random(0)
    for step in [1, *chance.sample(range(2, last - 2), 2), last_without, last - len(contents), last]:
        shutil.rmtree(stage.artifact)
        if step > last_without:
            shutil.copytree(older, stage.artifact)
        assert stage.run(kill_at=step) == -signal.SIGKILL, stage.output.read_text()
        assert not stage.looks_whole() or stage.contents() == contents
        assert stage.run() == 0, stage.output.read_text()
        assert stage.looks_whole()
        assert stage.contents() == contents
        assert stage.leftovers() == []
    print(name, last, last_without, time.monotonic() - begin)


@pytest.mark.parametrize("name", ["quantize-model", "generate-drafter-data", "train-drafter"])
def test_killed_at_any_time_it_is_made_as_if_undisturbed(stages: dict[str, Stage], name: str) -> None:
    """One kill after another, so that each run starts with what several before it left."""
    stage = stages[name]
    begin = time.monotonic()
    assert stage.run() == 0, stage.output.read_text()
    seconds = time.monotonic() - begin
    contents = stage.contents()
    shutil.rmtree(stage.artifact)
    for share in sorted(random.Random(1).uniform(0, 0.7) for _ in range(5)):
        process = stage.start()
        time.sleep(share * seconds)
        os.kill(process, signal.SIGKILL)
        print(name, seconds, share, stage.server.wait())
        assert not stage.looks_whole() or stage.contents() == contents
    assert stage.run() == 0, stage.output.read_text()
    assert stage.looks_whole()
    assert stage.contents() == contents
    assert stage.leftovers() == []
