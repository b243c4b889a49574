"""Int8 weights, one scale an output channel; activations stay as they are. For hardware without FP8."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from fourfold import __version__
from fourfold.artifacts.files import dump_json
from fourfold.progress import progress
from fourfold.quantize.layout import EXCLUDED, linear_names

INT8_MAX = 127


def quantize_int8(model_dir: Path, directory: Path) -> None:
    """Writes the checkpoint with each decoder linear as `weight` (int8 [out, in]) and `weight_scale` (float32 [out]).

    Works file by file, so that no more than one safetensors file of the model is in memory.
    """
    linears = {f"{name}.weight" for name in linear_names(AutoConfig.from_pretrained(model_dir))}
    place: dict[str, str] = {}
    files = sorted(model_dir.glob("*.safetensors"))
    total = 0
    with progress("quantise", len(linears), "layers") as task:
        for file in files:
            written: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118
                    tensor = source.get_tensor(name)
                    if name in linears:
                        written[name], written[f"{name}_scale"] = quantize_rows(tensor)
                        task.advance()
                    else:
                        written[name] = tensor
            place |= dict.fromkeys(written, file.name)
            total += sum(tensor.nbytes for tensor in written.values())
            save_file(written, directory / file.name, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (directory / "model.safetensors.index.json").write_text(dump_json(index), encoding="utf-8")
    (directory / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    quantization = {"quant_algo": "W8A16", "kv_cache_quant_algo": None, "exclude_modules": list(EXCLUDED)}
    content = {"producer": {"name": "fourfold", "version": __version__}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding to nearest of each row.

    Args:
        weight: [out, in], any floating-point dtype.
    Returns int8 [out, in] in -127..127, and float32 scales [out] > 0 with weight ≈ rows * scales.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / INT8_MAX
    # A row of zeros has no range: any scale gives the zeros back.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
