"""Runs Snakemake as a user does: the environment's own command, from the root of a checkout.

Each test gets a checkout of its own, package included, so that it may run, edit and break what it likes.
"""

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
    """A copy of the checkout to run the workflow in."""

    path: Path

    @property
    def package(self) -> Path:
        """The copy's own package."""
        return self.path / "workflow" / "src" / "fourfold"

    @property
    def environment(self) -> dict[str, str]:
        """The user's environment, with this copy's package, and without the environment's commands on PATH."""
        paths = [path for path in os.get_exec_path() if Path(path) != COMMANDS]
        return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(self.package.parent)}

    def command(self, *arguments: object) -> list[str]:
        """The command line of a call."""
        return [str(COMMANDS / "snakemake"), *map(str, arguments)]

    def snakemake(self, *arguments: object, timeout: float = 300, environment: dict[str, str] | None = None) -> Run:
        """Calls Snakemake, in the copy's environment or one that was made of it."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Run(done.returncode, done.stdout)

    def tiny(
        self,
        *arguments: object,
        config: tuple[str, ...] = (),
        timeout: float = 300,
        environment: dict[str, str] | None = None,
    ) -> Run:
        """A call with the tiny configuration and the local profile."""
        return self.snakemake(*arguments, *tiny_options(*config), timeout=timeout, environment=environment)

    def copy(self, path: Path) -> "Workspace":
        """A copy that may be changed; results, Snakemake's records and the files' times come along."""
        shutil.copytree(self.path, path, symlinks=True, dirs_exist_ok=True)
        return Workspace(path)


def tiny_options(*config: str) -> list[str]:
    """Options that choose the tiny configuration and the local profile."""
    overrides = ["--config", *config] if config else []
    return ["--workflow-profile", "local", "--configfile", "config/tiny.yaml", *overrides]


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the checkout in which nothing has run. Tests must not change it."""
    path = tmp_path_factory.mktemp("clean")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("config", "profiles", "envs", "workflow"):
        shutil.copytree(CHECKOUT / name, path / name, ignore=ignore)
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, path)
    return Workspace(path)


@pytest.fixture
def workspace(clean: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the checkout for one test."""
    return clean.copy(tmp_path / "checkout")


@pytest.fixture(scope="session")
def finished(clean: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy in which the tiny configuration has run to its end. Tests must not change it."""
    workspace = clean.copy(tmp_path_factory.mktemp("finished"))
    run = workspace.tiny(timeout=900)
    assert run.returncode == 0, run.output
    return workspace
