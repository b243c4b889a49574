"""A hash of the source that a stage runs, so that an edit re-runs the stages that it touches and no others.

The hash covers a module and every fourfold module that it imports, at any depth and also inside functions. Comments,
docstrings and layout do not count: only what Python executes. What cannot change an artifact does not count either:
see `EXEMPT`.
"""

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fourfold.errors import FourfoldError

PACKAGE = "fourfold"
ROOT = Path(__file__).resolve().parents[1]
EXEMPT = (
    "fourfold.config",
    "fourfold.errors",
    "fourfold.progress",
    "fourfold.artifacts.code",
    "fourfold.artifacts.provenance",
)
"""Modules, with all that they hold, that shape no artifact beside its provenance: messages and progress, this hash, and
the models of the configuration, whose values count by themselves (a new key of the benchmark must not re-train the
drafter). The version number of the package does not count either."""


def is_exempt(module: str) -> bool:
    """Whether an edit to the module leaves every artifact as it is."""
    return module == PACKAGE or any(module == name or module.startswith(f"{name}.") for name in EXEMPT)


@functools.cache
def module_path(module: str) -> Path | None:
    """File of a fourfold module; None if there is no such module."""
    base = ROOT.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@dataclass(frozen=True)
class Source:
    """What a module's source says: a digest of what it executes, and the names that it imports from this package."""

    digest: bytes
    imports: tuple[str, ...]


@functools.cache
def read_source(path: Path, module: str) -> Source:
    """Reads a module; some of the names that it imports may be no modules but names inside one.

    Raises FourfoldError when it is no Python, as after an edit that was interrupted.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise FourfoldError(f"{path}: line {error.lineno}: {error.msg}; finish the edit or take it back") from None
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from ..x import y`: level 1 is the module's own package, each further level one above.
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstrings, also those of attributes.
            node.body = [
                part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ] or [ast.Pass()]
    digest = hashlib.sha256(ast.dump(tree).encode()).digest()
    return Source(digest, tuple(name for name in found if name.split(".")[0] == PACKAGE))


@functools.cache
def imported_modules(module: str) -> frozenset[str]:
    """The module and all fourfold modules that it imports, directly or not, without those that are exempt."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        path = module_path(name)
        if name in seen or path is None or is_exempt(name):
            continue
        seen.add(name)
        # Importing a module runs its packages' __init__ too.
        pending.append(name.rpartition(".")[0])
        pending += read_source(path, name).imports
    return frozenset(seen)


@functools.cache
def code_hash(module: str) -> str:
    """Hash (16 hexadecimal digits) of what a module executes. Raises ValueError for an unknown module."""
    if module_path(module) is None:
        raise ValueError(f"no module {module}")
    digest = hashlib.sha256()
    for name in sorted(imported_modules(module)):
        path = module_path(name)
        assert path is not None
        digest.update(name.encode() + b"\0" + read_source(path, name).digest)
    return digest.hexdigest()[:16]
