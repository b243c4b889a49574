"""The tokenizer's files in the form that the transformers of TensorRT-LLM's releases (4.x) reads."""

import json
import shutil
from pathlib import Path

from fourfold.artifacts.files import dump_json
from fourfold.model.tokenizer import TOKENIZER_FILES

TOKENIZER = "tokenizer"
"""Folder of a checkpoint that holds them; beside an engine they lie in its own folder."""
_CONFIG = "tokenizer_config.json"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files.

    transformers 5 writes a class for `tokenizer.json` under a name that 4.x does not know; both know its older name.
    """
    for pattern in TOKENIZER_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    config = target / _CONFIG
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            config.write_text(dump_json(values | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
