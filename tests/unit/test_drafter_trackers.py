import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fourfold.drafter.trackers import Trackers
from fourfold.errors import FourfoldError


class Recorder(ModuleType):
    """Stands for a tracker's library, which no test installs: what it was called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **values: Any) -> "Recorder":
        self.calls.append(("init", values["config"]))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def SummaryWriter(self, log_dir: str) -> "Recorder":
        self.calls.append(("writer", log_dir))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append(("scalar", name, value, step))

    def close(self) -> None:
        self.calls.append(("close",))


def test_figures_reach_every_tracker_with_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, board = Recorder("wandb"), Recorder("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    trackers = Trackers(["wandb", "tensorboard"], tmp_path, {"seed": 0})
    trackers.log("heldout", 7, {"loss": 1.5, "redrafter0_top1": 0.5})
    trackers.close()
    named = {"heldout/loss": 1.5, "heldout/redrafter0_top1": 0.5}
    assert wandb.calls == [("init", {"seed": 0}), ("log", named, 7), ("finish",)]
    scalars = [("scalar", name, value, 7) for name, value in named.items()]
    assert board.calls == [("writer", str(tmp_path / "tensorboard")), *scalars, ("close",)]


def test_nothing_is_imported_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    trackers = Trackers([], tmp_path, {})
    trackers.log("train", 1, {"loss": 1.0})
    trackers.close()
    with pytest.raises(FourfoldError, match=r"trackers names wandb, which is not installed .* remove the name"):
        Trackers(["wandb"], tmp_path, {})
