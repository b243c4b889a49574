"""Stage quantize_model: a quantised checkpoint in the unified Hugging Face layout."""

import shutil
from pathlib import Path
from typing import Any

import torch

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.provenance import device_name
from fourfold.calibration.stage import read_texts
from fourfold.config.stages import QuantizeStage
from fourfold.errors import FourfoldError
from fourfold.progress import logger
from fourfold.quantize.fp8 import quantize_fp8
from fourfold.quantize.int8 import quantize_int8
from fourfold.quantize.verify import verify_checkpoint

# What a server needs beside the weights; the export writes a config.json of its own.
_COPIED = ("tokenizer*", "special_tokens_map.json", "*.jinja", "generation_config.json", "merges.txt", "vocab*")


def quantize_model(
    settings: QuantizeStage, model: Path, calibration: Path | None, output: Path, device: str = "auto"
) -> None:
    """Quantises the decoder's linear layers; the embedding, the output layer and the norms stay as they are.

    Args:
        settings: the precision (`fp8` or `int8_wo`), and how the calibration texts are run.
        model: manifest of the model.
        calibration: manifest of the calibration texts; needed for fp8 alone.
        device: auto, cpu or cuda (int8 needs no device: it is arithmetic on the weights).
    Raises FourfoldError for bad input, before long work starts, and for an export that is not what was asked for.
    """
    place = _device(device)
    described = read_manifest(model, "fetch_model")
    source = model.parent
    texts = _texts(settings, calibration)
    wide = _wide_dtype(described["tensor_bytes"], settings.precision)
    inputs = {"model": model, **({"calibration": calibration} if texts and calibration else {})}
    with write_artifact(
        output,
        stage="quantize_model",
        settings=settings.model_dump(),
        inputs=inputs,
        libraries=["torch", "transformers", "nvidia-modelopt", "safetensors"],
        device=device_name(str(place)),
    ) as staging:
        if settings.precision == "fp8":
            quantize_fp8(source, texts, settings.quantize, staging.path, place)
        else:
            quantize_int8(source, staging.path)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                shutil.copyfile(file, staging.path / file.name)
        staging.facts.update(verify_checkpoint(staging.path, settings.precision, wide))
        staging.facts["calibration_texts"] = len(texts)
    megabytes = staging.facts["weight_bytes"] / 1e6
    logger.info("%s: %d layers, %.1f MB", settings.precision, staging.facts["quantised_layers"], megabytes)


def _device(device: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not cuda):
        known = "auto, cpu or cuda" if cuda else "auto or cpu: no GPU is here"
        raise FourfoldError(f"--device: {device!r}, expected {known}")
    return torch.device("cuda" if cuda and device != "cpu" else "cpu")


def _texts(settings: QuantizeStage, calibration: Path | None) -> list[str]:
    if settings.precision == "int8_wo":
        return []
    if settings.precision != "fp8":
        raise FourfoldError(f"precision {settings.precision}: there is nothing to quantise; use the model itself")
    if calibration is None:
        raise FourfoldError("--calibration: fp8 needs calibration texts; give the manifest of build_calibration")
    texts = read_texts(calibration)
    if not texts:
        raise FourfoldError(f"{calibration}: no calibration texts; raise calibration.samples")
    return texts


def _wide_dtype(tensor_bytes: dict[str, Any], precision: str) -> str:
    # ModelOpt exports in bfloat16 whatever the model came in; int8 leaves the rest as it is.
    if precision == "fp8":
        return "BF16"
    if len(tensor_bytes) != 1:
        raise FourfoldError(f"the model's tensors have several dtypes ({', '.join(tensor_bytes)}); expected one")
    return next(iter(tensor_bytes))
