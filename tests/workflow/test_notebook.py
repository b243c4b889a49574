"""The notebook: a target of the workflow that runs from its first cell to its last."""

from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import Workspace

from fourfold.sandbox.selftest import SandboxUnavailable, require_isolation


def test_it_serves_solves_stops_and_draws(finished: Workspace, tmp_path: Path) -> None:
    try:
        require_isolation()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    workspace = finished.copy(tmp_path / "copy")
    run = workspace.tiny("notebook")
    assert run.returncode == 0, run.output
    notebook = nbformat.read(workspace.path / "results" / "tiny" / "notebook" / "solve.ipynb", 4)
    said = "".join(
        output.get("text", "") + "".join(output.get("data", {}))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "http://127.0.0.1:" in said
    assert "executions (0.00 s in code" in said
    assert "2 of 4 generations ended" in said
    assert "image/svg+xml" in said
    assert not any(str(workspace.path) in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
