"""A tiny model with what its drafter is made of, for the drafter's tests."""

from pathlib import Path

import pytest
import torch
from drafter_stages import PROBLEMS, make_data, problem_rows, train, training

from fourfold.artifacts import write_artifact
from fourfold.artifacts.files import write_jsonl
from fourfold.config.model import TinyModel
from fourfold.model.stage import fetch_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, problems and training data, as artifacts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("drafter")
    fetch_model(TinyModel(source="tiny"), folder / "model" / "manifest.json")
    with write_artifact(folder / "problems" / "manifest.json", stage="fetch_problems", settings={}) as staging:
        write_jsonl(staging.path / "train.jsonl", problem_rows(PROBLEMS, 1))
        write_jsonl(staging.path / "benchmark.jsonl", problem_rows(3, 50))
        write_jsonl(staging.path / "unseen.jsonl", problem_rows(2, 70))
    make_data(folder, "data")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Path:
    return train(root, "uninterrupted", training())
