"""Tiny random checkpoints, written by transformers itself: the reference that our model is held to."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_reference(architecture: str = "llama", seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random transformers model with large enough weights that its greedy text varies."""
    torch.manual_seed(seed)
    values = {**SHAPE, "initializer_range": 0.15, **changes}
    if architecture == "llama":
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**values))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    # Rounded to what is stored; buffers (RoPE's frequencies) are not stored and stay as they are.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.eval()


def save_reference(model: Any, path: Path) -> Path:
    """Writes it as a bf16 checkpoint, as real ones are."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
    return path
