"""Runs Snakemake as a user does: the environment's own command, in a working directory of its own."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent


@dataclass
class Run:
    """A finished call of Snakemake."""

    returncode: int
    output: str
    """Standard output and error."""

    @property
    def jobs(self) -> dict[str, int]:
        """Rule → jobs, from the table of what a (dry) run does; targets left out."""
        table = re.search(r"^job +count\n[- ]+\n(.*?)\ntotal ", self.output, re.DOTALL | re.MULTILINE)
        rows = (line.split() for line in table[1].splitlines()) if table else []
        return {name: int(count) for name, count in rows if "_" in name}

    @property
    def nothing_to_do(self) -> bool:
        """Whether everything was up to date."""
        return "Nothing to be done" in self.output


@dataclass
class Workspace:
    """A working directory with the checkout's Snakefile, configurations and profiles."""

    path: Path

    def command(self, *arguments: object) -> list[str]:
        """The command line of a call."""
        return [str(COMMANDS / "snakemake"), "--snakefile", str(CHECKOUT / "Snakefile"), *map(str, arguments)]

    def snakemake(self, *arguments: object, timeout: float = 300) -> Run:
        """Calls Snakemake, without the environment's directory on PATH."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Run(done.returncode, done.stdout)

    def tiny(self, *arguments: object, config: tuple[str, ...] = (), timeout: float = 300) -> Run:
        """A call with the tiny configuration and the local profile."""
        common = ["--workflow-profile", "local", "--configfile", "config/tiny.yaml"]
        overrides = ["--config", *config] if config else []
        return self.snakemake(*arguments, *common, *overrides, timeout=timeout)


def environment() -> dict[str, str]:
    """The user's environment, but with the environment's commands off PATH: it need not be activated."""
    paths = [path for path in os.get_exec_path() if Path(path) != COMMANDS]
    return {**os.environ, "PATH": os.pathsep.join(paths)}


def make_workspace(path: Path) -> Workspace:
    """Copies what a run reads from its working directory."""
    for name in ("config", "profiles"):
        shutil.copytree(CHECKOUT / name, path / name)
    return Workspace(path)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty working directory."""
    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A working directory in which the tiny configuration has run to its end. Tests must not change it."""
    workspace = make_workspace(tmp_path_factory.mktemp("finished"))
    run = workspace.tiny(timeout=600)
    assert run.returncode == 0, run.output
    return workspace
