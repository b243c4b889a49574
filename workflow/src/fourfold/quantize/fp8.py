"""FP8 (E4M3) weights and activations with static per-tensor scales, by NVIDIA ModelOpt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fourfold.config.quantize import QuantizeSettings
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import encode_rendered, load_tokenizer
from fourfold.progress import progress
from fourfold.quantize.layout import linear_groups
from fourfold.quantize.packing import packed_batches
from fourfold.quantize.quiet import quiet_libraries


def quantize_fp8(
    model_dir: Path, texts: Sequence[str], settings: QuantizeSettings, directory: Path, device: torch.device
) -> None:
    """Calibrates, quantises and exports the unified Hugging Face checkpoint.

    One copy of the model is in memory: float32 on a CPU, where that is several times faster than bfloat16, and
    bfloat16 on a GPU. What is not quantised is exported in bfloat16.
    """
    tokenizer = load_tokenizer(model_dir)
    tokens = [encode_rendered(tokenizer, text)[: settings.max_length] for text in texts]
    with quiet_libraries():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
        model.to(device).eval()
        with torch.inference_mode():
            mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda quantised: _calibrate(quantised, tokens, settings))
            share_weight_scales(model)
            # Parameters alone: the activations' ranges are buffers and keep their precision. The weights were
            # bfloat16 in the checkpoint, so they lose nothing, and CPU and GPU export the same FP8 weights.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)


def _calibrate(model: Any, tokens: Sequence[Sequence[int]], settings: QuantizeSettings) -> None:
    with progress("calibrate", len(tokens), "texts") as task:
        for batch in packed_batches(tokens, settings.batch_size, model.device):
            # The decoder without the output layer: that one is not quantised, and its logits would be large.
            model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
            task.advance(batch.texts)


def share_weight_scales(model: Any) -> None:
    """Gives layers that engines fuse (q, k, v; gate, up) the largest of their weight ranges.

    A fused FP8 product has one weight scale. Without this an engine would have to rescale and round the weights a
    second time when it loads them. E4M3 is a floating-point format, and a range several times too wide costs next to
    nothing: on SmolLM2-135M the weights' relative rounding error goes from 2.65 to 2.66 percent.
    """
    for group in linear_groups(model.config):
        quantizers = [model.get_submodule(name).weight_quantizer for name in group]
        if any(quantizer.amax is None for quantizer in quantizers):
            raise FourfoldError(f"{group[0]}: ModelOpt left it without a weight range; check its version")
        widest = torch.stack([quantizer.amax for quantizer in quantizers]).max()
        for quantizer in quantizers:
            quantizer.amax = widest
