"""Packages import only earlier ones, and the command line starts without the heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold.artifacts.code import read_source

ROOT = Path(fourfold.__file__).parent
ORDER = [
    {"errors", "progress", "config", "artifacts"},
    {"profiles"},
    {"sandbox"},
    {"modeling"},
    {"model"},
    {"problems"},
    {"calibration"},
    {"quantize"},
    {"engine"},
    {"trtllm"},
    {"server"},
    {"drafter"},
    {"tuning"},
    {"client"},
    {"tools"},
    {"benchmark"},
    {"fidelity"},
    {"report"},
    {"cli"},
]
HEAVY = ("torch", "transformers", "datasets", "modelopt", "pandas", "matplotlib", "pyarrow", "numpy", "scipy")
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def rank(package: str) -> int:
    return next(i for i, packages in enumerate(ORDER) if package in packages)


def test_every_package_has_its_place() -> None:
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert packages <= set.union(*ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_earlier_packages_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    module = ".".join(["fourfold", *path.relative_to(ROOT).with_suffix("").parts])
    imported = {name.split(".")[1] for name in read_source(path, module).imports if name.count(".")}
    known = set.union(*ORDER)
    later = {name for name in imported & known if rank(name) > rank(package)}
    assert later == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute(path: Path) -> None:
    levels = [node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not any(levels)


@pytest.mark.parametrize(
    "module", ["cli", "config", "config.document", "artifacts.code", "artifacts.provenance", "report.files"]
)
def test_no_heavy_library_is_imported_at_the_start(module: str) -> None:
    """A dry run must answer at once."""
    code = f"import sys, fourfold.{module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
