"""The hash of a stage's code: it changes with what the stage runs, and with nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourfold.artifacts import code
from fourfold.errors import FourfoldError

FILES = {
    "__init__.py": '__version__ = "1"\n',
    "errors.py": "class E(Exception): ...\n",
    "config/__init__.py": "",
    "config/base.py": "X = 1\n",
    "tools/__init__.py": '"""Tools."""\nfrom fourfold.tools.deep import VALUE\n',
    "tools/deep.py": "VALUE = 1\n",
    "tools/lazy.py": "def late():\n    return 1\n",
    "other.py": "Y = 1\n",
    "stage.py": (
        '"""A stage."""\nfrom fourfold.config.base import X\nfrom fourfold.errors import E\n'
        "from fourfold import tools\n\n\ndef run(a: int) -> int:\n"
        '    """Runs."""\n    from fourfold.tools.lazy import late\n\n    return a + late()  # add\n'
    ),
    "relative.py": "from .tools import deep\nfrom . import other\n",
}


def forget() -> None:
    """Forgets what was read: a process reads each file once."""
    for cached in (code.module_path, code.read_source, code.imported_modules, code.code_hash):
        cached.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def hash_after(path: Path, old: str, new: str, module: str = "fourfold.stage") -> tuple[str, str]:
    """The hash before and after an edit."""
    before = code.code_hash(module)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    forget()
    return before, code.code_hash(module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # add", "  # sum of both"),
        ('"""Runs."""', '"""Runs the stage."""'),
        ('"""A stage."""\n', ""),
        ("    return a", "\n\n    return a"),
        ("a + late()", "(a + late())"),
    ],
)
def test_words_and_layout_do_not_count(package: Path, old: str, new: str) -> None:
    before, after = hash_after(package / "stage.py", old, new)
    assert before == after


@pytest.mark.parametrize(("old", "new"), [("a + late()", "a - late()"), ("a: int", "a: float"), ("run", "go")])
def test_code_counts(package: Path, old: str, new: str) -> None:
    before, after = hash_after(package / "stage.py", old, new)
    assert before != after


@pytest.mark.parametrize("file", ["tools/__init__.py", "tools/deep.py", "tools/lazy.py"])
def test_imported_modules_count(package: Path, file: str) -> None:
    """Whether through a package, at any depth, or inside a function."""
    (package / file).write_text((package / file).read_text() + "\nNEW = 1\n")
    changed = code.code_hash("fourfold.stage")
    (package / file).write_text(FILES[file])
    forget()
    assert code.code_hash("fourfold.stage") != changed


def test_other_modules_do_not_count(package: Path) -> None:
    before, after = hash_after(package / "other.py", "Y = 1", "Y = 2")
    assert before == after


def test_relative_imports_are_followed(package: Path) -> None:
    assert code.imported_modules("fourfold.relative") == {
        "fourfold.relative",
        "fourfold.other",
        "fourfold.tools",
        "fourfold.tools.deep",
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("__init__.py", '"1"', '"2"'),
        ("errors.py", "E(", "Ex("),
        ("config/base.py", "1", "2"),
    ],
)
def test_what_shapes_no_artifact_does_not_count(package: Path, file: str, old: str, new: str) -> None:
    """The version number, messages, and the models of the configuration, whose values count by themselves."""
    before, after = hash_after(package / file, old, new)
    assert before == after


def test_an_unknown_module_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"fourfold\.nothing"):
        code.code_hash("fourfold.nothing")


def test_an_interrupted_edit_is_named(package: Path) -> None:
    (package / "stage.py").write_text("def run(\n")
    with pytest.raises(FourfoldError, match=r"stage\.py: line 1: .*; finish the edit or take it back"):
        code.code_hash("fourfold.stage")


def test_a_stage_does_not_count_what_comes_after_it() -> None:
    """An edit to the report only redraws the report."""
    for stage in ("model.stage", "quantize.stage", "drafter.train", "engine.build", "benchmark.stage"):
        later = {name for name in code.imported_modules(f"fourfold.{stage}") if name.startswith("fourfold.report")}
        assert later == set()


def test_executable_code_is_read_as_python_does() -> None:
    """The hash rests on `ast`: it must read every module of the package."""
    for path in code.ROOT.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))
