"""What all tests need: Triton's interpreter where there is no GPU, and how tests are spread over processes."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


def process_group(item: pytest.Item) -> str:
    """Tests of a group run in one process of several, one after the other: those of a file, and of some, several files.

    A finished run takes a minute, and Snakemake works on it alone; the sandbox's tests count the machine's processes.
    """
    if "finished" in getattr(item, "fixturenames", ()):
        return "finished"
    return "sandbox" if item.path.name.startswith("test_sandbox") else item.path.name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`; what waits for a finished run takes longest, and starts first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    items.sort(key=lambda item: process_group(item) != "finished")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(process_group(item)))
