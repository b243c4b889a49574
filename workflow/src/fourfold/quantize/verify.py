"""Checks what was written: a checkpoint that is quantised in part, or not at all, must not pass for a whole one."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fourfold.artifacts.tensors import read_header
from fourfold.errors import FourfoldError
from fourfold.quantize.layout import EXCLUDED, linear_groups, linear_names

_ALGORITHM = {"fp8": "FP8", "int8_wo": "W8A16"}
_STORED = {"fp8": "F8_E4M3", "int8_wo": "I8"}
_BYTES = {"F8_E4M3": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}


def verify_checkpoint(directory: Path, precision: str, wide: str) -> dict[str, Any]:
    """Compares names, dtypes, shapes and bytes with what the model's configuration means; checks every scale.

    Args:
        directory: the quantised checkpoint.
        precision: `fp8` or `int8_wo`.
        wide: safetensors dtype of what is not quantised (`BF16`).
    Returns facts for the manifest. Raises FourfoldError with the first thing that is wrong.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    expected = expected_tensors(config, precision, wide)
    files = sorted(directory.glob("*.safetensors"))
    found = {name: info for file in files for name, info in read_header(file).items()}
    if difference := sorted(expected.keys() ^ found.keys()):
        kind = "is missing" if difference[0] in expected else "is not expected"
        raise FourfoldError(f"{precision} checkpoint: tensor {difference[0]} {kind} (of {len(difference)})")
    for name, (dtype, shape) in expected.items():
        info = found[name]
        if (info["dtype"], tuple(info["shape"])) != (dtype, shape):
            raise FourfoldError(
                f"{precision} checkpoint: {name} is {info['dtype']} {info['shape']}, expected {dtype} {list(shape)}"
            )
    stored = sum(info["data_offsets"][1] - info["data_offsets"][0] for info in found.values())
    meant = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in expected.values())
    if stored != meant:
        raise FourfoldError(f"{precision} checkpoint: {stored} bytes of tensors, {meant} expected")
    _check_scales(files, config, precision)
    _check_description(directory, precision)
    return {"quantised_layers": len(linear_names(config)), "weight_bytes": stored}


def expected_tensors(config: PretrainedConfig, precision: str, wide: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (safetensors dtype, shape) of every tensor of a quantised checkpoint."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_plain(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    expected = {name: (wide, shape) for name, shape in shapes.items()}
    for name in linear_names(config):
        out = shapes[f"{name}.weight"][0]
        expected[f"{name}.weight"] = (_STORED[precision], shapes[f"{name}.weight"])
        expected[f"{name}.weight_scale"] = ("F32", () if precision == "fp8" else (out,))
        if precision == "fp8":
            expected[f"{name}.input_scale"] = ("F32", ())
    return expected


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    # With its quantization_config transformers would look for a quantiser of its own.
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    return type(config).from_dict(values)


def _check_scales(files: list[Path], config: PretrainedConfig, precision: str) -> None:
    scales: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as source:
            names = [name for name in source.keys() if name.endswith("_scale")]  # noqa: SIM118
            scales.update({name: source.get_tensor(name) for name in names})
    for name, scale in scales.items():
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise FourfoldError(f"{precision} checkpoint: {name} holds a scale that is not a positive number")
    if precision != "fp8":
        return
    for group in linear_groups(config):
        for kind in ("weight_scale", "input_scale"):
            if len({float(scales[f"{name}.{kind}"]) for name in group}) != 1:
                raise FourfoldError(f"fp8 checkpoint: {', '.join(group)} do not share their {kind}")


def _check_description(directory: Path, precision: str) -> None:
    quantization = json.loads((directory / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    algorithm, excluded = quantization["quant_algo"], quantization["exclude_modules"]
    if algorithm != _ALGORITHM[precision] or not set(EXCLUDED) <= set(excluded):
        raise FourfoldError(f"hf_quant_config.json says {algorithm} without {excluded}, not what was asked for")
