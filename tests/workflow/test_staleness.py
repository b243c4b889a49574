"""After one single change, exactly the jobs of the tables in docs/exactness.md run again.

Each change is made for real in a copy of a finished run, and `snakemake -n` is asked what it would do.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT, Run, Workspace, tiny_options
from fork_server import ForkServer

RULES = {
    "model": "fetch_model",
    "problems": "fetch_problems",
    "calibration": "build_calibration",
    "quantize": "quantize_model",
    "fidelity": "compare_logits",
    "data": "generate_drafter_data",
    "train": "train_drafter",
    "evaluate": "evaluate_drafter",
    "tune": "tune_engine",
    "engine": "build_engine",
    "benchmark": "benchmark_engine",
    "overhead": "measure_overhead",
    "report": "make_report",
}
Jobs = dict[str, int]


def read_tables() -> Iterator[tuple[str, str, Jobs]]:
    """Kind of change, change, jobs by rule: the rows of the tables whose columns are the stages."""
    kind = None
    for line in (CHECKOUT / "docs" / "exactness.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1:] == list(RULES):
            kind = cells[0]
        elif not line.startswith("|"):
            kind = None
        elif kind and not cells[0].startswith("---"):
            counts = zip(RULES.values(), cells[1:], strict=True)
            yield kind, cells[0], {rule: int(count) for rule, count in counts if count}


ROWS = list(read_tables())


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Puts back the files' content after the block; their times are new."""
    contents = {path: path.read_bytes() for path in paths}
    yield
    for path, content in contents.items():
        path.write_bytes(content)


@contextmanager
def changed_key(place: Workspace, change: str) -> Iterator[None]:
    """Sets a key of the configuration file; a list under `engines` gives their order."""
    path = place.path / "config" / "tiny.yaml"
    found = re.match("`(.*?)`", change)
    assert found
    ((key, value),) = yaml.safe_load(found[1]).items()
    with restored(path):
        values = section = yaml.safe_load(path.read_text(encoding="utf-8"))
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = {name: section[last][name] for name in value} if isinstance(value, list) else value
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        yield


@contextmanager
def edited_module(place: Workspace, change: str) -> Iterator[None]:
    """A statement more in a module."""
    path = place.package / change.strip("`")
    with restored(path):
        path.write_text(path.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")
        yield


@contextmanager
def other_version(place: Workspace, change: str) -> Iterator[None]:
    """Another version of a library, as its installed metadata state it; they come first on Python's path."""
    name = change.strip("`")
    folder = place.package.parent / f"{name.replace('-', '_')}-99.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    yield
    shutil.rmtree(folder)


@contextmanager
def other_problem(place: Workspace) -> Iterator[None]:
    path = place.path / "config" / "tiny-problems.jsonl"
    asked = (place.path / "results" / "tiny" / "problems" / "benchmark.jsonl").read_text(encoding="utf-8")
    with restored(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        index = next(i for i, line in enumerate(lines) if yaml.safe_load(line)["problem"] in asked)
        lines[index] = lines[index].replace('"problem": "', '"problem": "Attention: ')
        path.write_text("".join(lines), encoding="utf-8")
        yield


def touch(*roots: Path) -> AbstractContextManager[None]:
    for root in roots:
        for path in root.rglob("*"):
            os.utime(path)
    return nullcontext()


@contextmanager
def commented(suffix: str, root: Path) -> Iterator[None]:
    paths = sorted(root.rglob(f"*{suffix}"))
    with restored(*paths):
        for path in paths:
            path.write_text(f"# Edited.\n{path.read_text(encoding='utf-8')}# edited\n", encoding="utf-8")
        yield


@contextmanager
def moved(place: Workspace) -> Iterator[None]:
    elsewhere, before = place.path.with_name("elsewhere"), place.path
    place.path.rename(elsewhere)
    place.path = elsewhere
    yield
    elsewhere.rename(before)
    place.path = before


def taken_back(place: Workspace) -> AbstractContextManager[None]:
    for path in sorted(place.package.glob("drafter/*.py")):
        with edited_module(place, str(path.relative_to(place.package))):
            pass
    return nullcontext()


def made_again(place: Workspace) -> AbstractContextManager[None]:
    """Runs two stages once more, with everything committed: the finished run knew of no commit."""
    for command in ("init --quiet", "add --all workflow config", "commit --quiet --message=x"):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *identity, *command.split()], cwd=place.path, check=True)
    artifacts = [place.path / "results" / "tiny" / name for name in ("problems", "calibration")]
    before = [(folder / "provenance.json").read_bytes() for folder in artifacts]
    run = place.tiny("--force", *(f"results/tiny/{folder.name}/manifest.json" for folder in artifacts))
    assert run.jobs == {"fetch_problems": 1, "build_calibration": 1}, run.output
    after = [(folder / "provenance.json").read_bytes() for folder in artifacts]
    assert all(one != other for one, other in zip(before, after, strict=True))
    return nullcontext()


DEEDS: dict[str, Callable[[Workspace], AbstractContextManager[None]]] = {
    "another text of one benchmark problem in `problems.path`": other_problem,
    "every artifact touched": lambda place: touch(place.path / "results"),
    "every source and configuration touched": lambda place: touch(place.path / "workflow", place.path / "config"),
    "a comment in every module": lambda place: commented(".py", place.package),
    "a comment in the configuration": lambda place: commented(".yaml", place.path / "config"),
    "the checkout moved to another folder": moved,
    "an edit made and taken back": taken_back,
    "problems and calibration made again, at another commit": made_again,
}
CHANGES: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "key": changed_key,
    "module": edited_module,
    "library": other_version,
    "deed": lambda place, change: DEEDS[change](place),
}


@pytest.fixture(scope="module")
def place(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the finished run; each test puts back what it changes."""
    return finished.copy(tmp_path_factory.mktemp("staleness") / "checkout")


@pytest.fixture(scope="module")
def snakemake() -> Iterator[ForkServer]:
    """Snakemake's command, loaded once; this package is not loaded, so that each run reads its own copy."""
    with ForkServer("snakemake.cli:main", "pydantic", "yaml", "rich.progress") as server:
        yield server


def dry_run(snakemake: ForkServer, place: Workspace, output: Path) -> Run:
    """What `snakemake -n` says, from a process of its own."""
    code = snakemake.run(["-n", *tiny_options()], place.path, output, place.environment)
    return Run(code, output.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kind", "change", "jobs"), ROWS, ids=[change for _, change, _ in ROWS])
def test_a_change_reruns_what_depends_on_it(
    place: Workspace, snakemake: ForkServer, tmp_path: Path, kind: str, change: str, jobs: Jobs
) -> None:
    with CHANGES[kind](place, change):
        run = dry_run(snakemake, place, tmp_path / "output")
    assert run.returncode == 0, run.output
    assert run.jobs == jobs, run.output
    assert run.nothing_to_do == (not jobs)


def test_every_kind_of_change_is_in_the_tables() -> None:
    assert {kind for kind, _, _ in ROWS} == set(CHANGES)
    assert [change for kind, change, _ in ROWS if kind == "deed"] == list(DEEDS)


def test_an_interrupted_edit_is_named(place: Workspace, snakemake: ForkServer, tmp_path: Path) -> None:
    path = place.package / "report" / "verdict.py"
    with restored(path):
        path.write_text(path.read_text(encoding="utf-8") + "\ndef half(\n", encoding="utf-8")
        run = dry_run(snakemake, place, tmp_path / "output")
    assert run.returncode == 1
    assert re.search(r"report/verdict\.py: line \d+: .*; finish the edit or take it back", run.output)
    assert dry_run(snakemake, place, tmp_path / "output").nothing_to_do
