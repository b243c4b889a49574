"""What all tests need: Triton's interpreter where there is no GPU, and how tests are spread over processes."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each of several processes a file at a time, or a group of files that must run one after the other.

    The workflow's tests share a finished run, on which Snakemake works alone; the sandbox's count processes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = ("tests/workflow/", "tests/unit/test_sandbox")
            return next((group for group in shared if file.startswith(group)), file)

    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes, one starts with the workflow's tests, which take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.parent.name != "workflow")
