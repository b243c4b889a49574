"""Takes a checkpoint directory of this machine into the results."""

import os
import shutil
from pathlib import Path

from fourfold.config.model import LocalModel
from fourfold.config.sources import NO_WEIGHTS
from fourfold.errors import FourfoldError

# Weights in safetensors alone: the pickle formats run code when they are opened.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*")
# The artifact writes its own.
_EXCLUDED = "manifest.json"


def fetch_local(settings: LocalModel, directory: Path) -> None:
    """Hard-links (or, across file systems, copies) the checkpoint's weights; copies its small files.

    Raises FourfoldError when the directory holds no checkpoint.
    """
    source = Path(settings.path).expanduser()
    if not source.is_dir():
        raise FourfoldError(f"model.path: {source} is not a directory")
    if not (source / "config.json").is_file():
        raise FourfoldError(f"model.path: {source} holds no config.json; save the model with save_pretrained")
    if not any(source.glob("*.safetensors")):
        raise FourfoldError(f"model.path: {source} {NO_WEIGHTS}")
    files = {file for pattern in PATTERNS for file in source.glob(pattern) if file.name != _EXCLUDED}
    for file in sorted(files):
        take_file(file, directory / file.name)


def take_file(source: Path, target: Path) -> None:
    """Hard-links weights, which are never changed in place and may be large; copies anything else."""
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)
