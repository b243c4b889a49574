"""Experiment trackers: optional libraries that are imported only when the configuration names them."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError

MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


class Trackers:
    """Reports figures to each tracker that is named.

    Args:
        names: `wandb`, `tensorboard`.
        work: folder for what they write on this machine.
        settings: the training's configuration, as plain values.
    Raises FourfoldError when a library is not installed.
    """

    def __init__(self, names: Sequence[str], work: Path, settings: dict[str, Any]) -> None:
        modules = {name: _import(name) for name in dict.fromkeys(names)}
        self._writer = self._run = None
        if "tensorboard" in modules:
            self._writer = modules["tensorboard"].SummaryWriter(log_dir=str(work / "tensorboard"))
        if "wandb" in modules:
            self._run = modules["wandb"].init(project="fourfold", job_type="train_drafter", dir=work, config=settings)

    def log(self, split: str, step: int, figures: dict[str, float]) -> None:
        """Reports figures as `split/name` at an optimiser step."""
        named = {f"{split}/{name}": value for name, value in figures.items()}
        if self._writer is not None:
            for name, value in named.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(named, step=step)

    def close(self) -> None:
        """Ends the runs."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise FourfoldError(
            f"drafter.training.trackers names {name}, which is not installed ({error}); install it or remove the name"
        ) from None
