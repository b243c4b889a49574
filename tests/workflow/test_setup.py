"""The set-up: profile links, and one clear line for each thing that may be missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Workspace

OLD = '#!/bin/sh\ncase "$1" in --version) echo "Python 3.10.2";; *) exit 1;; esac\n'
# Answers the question for its version, but not the one for the modules.
BARE = '#!/bin/sh\ncase "$2" in *version_info*) exit 0;; *) exit 1;; esac\n'


@pytest.fixture
def checkout(workspace: Workspace) -> Path:
    """A checkout in which no set-up has run."""
    return workspace.path


def setup(checkout: Path, python: str = "no-such-python") -> subprocess.CompletedProcess[str]:
    """Runs the set-up as far as it gets with that interpreter: the links come first."""
    return subprocess.run(
        [checkout / "envs" / "setup.sh"], capture_output=True, text=True, env={**os.environ, "PYTHON": python}
    )


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_missing_python_is_one_line(checkout: Path) -> None:
    done = setup(checkout)
    assert done.returncode == 1
    assert done.stderr == "setup: no-such-python not found; install Python 3.11 or newer, or set PYTHON\n"
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_one_line(checkout: Path) -> None:
    done = setup(checkout, script(checkout / "python", OLD))
    assert done.returncode == 1
    assert done.stderr == ("setup: Python 3.10.2 is too old; install Python 3.11 or newer, or set PYTHON=python3.11\n")


def test_a_python_without_venv_names_the_package(checkout: Path) -> None:
    done = setup(checkout, script(checkout / "python", BARE))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sudo apt install python3-venv" in done.stderr


def test_someone_elses_venv_stays(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    done = setup(checkout, sys.executable)
    assert done.returncode == 1
    assert done.stderr == "setup: .venv was not made by this set-up; move it away\n"
    assert (checkout / ".venv" / "mine").exists()


def test_a_finished_setup_is_not_repeated(checkout: Path) -> None:
    """The stamp holds a checksum of the lock and the project; an edit of either sets up again."""
    commands = checkout / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "python").symlink_to(sys.executable)
    sums = "cat envs/requirements.txt pyproject.toml | cksum"
    key = subprocess.run(sums, shell=True, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    (checkout / ".venv" / "complete").write_text(f"{key}\n{checkout} no-such-python\n")
    assert setup(checkout).returncode == 0
    with (checkout / "envs" / "requirements.txt").open("a") as lock:
        lock.write("# edited\n")
    assert setup(checkout).returncode == 1


def test_links_are_made_and_left_alone(checkout: Path) -> None:
    for _ in range(2):
        setup(checkout)
        for name in ("local", "slurm"):
            assert (checkout / name).readlink() == Path("profiles") / name


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_what_is_not_ours_is_never_overwritten(checkout: Path, kind: str) -> None:
    path = checkout / "local"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("config" if kind == "link" else "nowhere")
    before = path.read_text() if kind == "file" else path.readlink()
    done = setup(checkout)
    assert (path.read_text() if kind == "file" else path.readlink()) == before
    assert done.stderr.splitlines()[0].startswith("setup: ./local is not ours and stays; use --workflow-profile local")
    assert (checkout / "slurm").is_symlink()


@pytest.mark.parametrize("option", ["--profile local", "--profile slurm", "--workflow-profile local"])
def test_profiles_are_found_by_name(workspace: Workspace, option: str) -> None:
    setup(workspace.path)
    run = workspace.snakemake(*option.split(), "-n", "--configfile", "config/tiny.yaml")
    assert run.returncode == 0, run.output
    assert "fourfold --log results/tiny/logs/fetch_model.log fetch-model" in run.output
