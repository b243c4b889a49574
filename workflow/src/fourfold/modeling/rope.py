"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form that Llama and Qwen2 use."""

import math

import torch
from torch import Tensor

from fourfold.modeling.config import TransformerConfig


def inverse_frequencies(config: TransformerConfig) -> Tensor:
    """Angle per position of each dimension pair, float32 [head_dim / 2]; scaled for `linear` and `llama3`."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    # llama3: short wavelengths stay, long ones are stretched by the factor, those between are interpolated.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def rope_tables(config: TransformerConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for positions 0 … length-1.

    Returns two float32 tensors [length, head_dim]. The first half of the sines is negative, so that
    `apply_rope` needs one swap of halves and no further sign.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., heads, head_dim] by tables broadcastable to it, as given by `rope_tables`; keeps its dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def head_tables(cos: Tensor, sin: Tensor, rotated: int, plain: int) -> tuple[Tensor, Tensor]:
    """Tables for heads of which the first are rotated and the rest stay as they are (the values).

    Args: cos, sin [batch, tokens, head_dim] at the tokens' positions. Returns two [batch, tokens, heads, head_dim].
    """
    batch, tokens, dim = cos.shape
    shape = (batch, tokens, rotated, dim)
    same = torch.ones(batch, tokens, plain, dim, device=cos.device)
    cos = torch.cat((cos[:, :, None].expand(shape), same), 2)
    sin = torch.cat((sin[:, :, None].expand(shape), torch.zeros_like(same)), 2)
    return cos, sin
