"""A small model inside a large one's shape: the small model's function at the large model's cost.

Where no weights of a large model are at hand, its speed can be measured with random ones, but nothing that depends on
text, as acceptance does. A carrier has real text. Everything it adds is zero: residual width, heads, head dimensions,
the rows of the MLP, and whole layers, which then add nothing to the residual stream.

- RMSNorm: the mean is over the larger width, so weights are scaled by sqrt(small / large) and eps by small / large.
- RoPE: pair i of a head of s dimensions turns as fast as pair r * i of one of r * s dimensions; the attention's scale
  is smaller by sqrt(r), so queries are larger by it.
- Tokens that the small model does not have must never be chosen: one more dimension of the residual stream holds a
  small constant, which no layer reads or writes and the final norm enlarges; it makes their logits very low.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import FourfoldError
from fourfold.modeling.checkpoint import Weights, expected_shapes
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig

QWEN2_14B = TransformerConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    rope_scaling=None,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
"""Qwen2.5-14B, the shape of OpenMath-Nemotron-14B."""
CONSTANT, ENLARGED, LOW = 2.0**-8, 2.0**10, -(2.0**12)
"""The constant, the final norm's weight for it, and the output matrix's weight for tokens that must not be chosen."""


def random_weights(shape: TransformerConfig, device: torch.device, seed: int = 0) -> Weights:
    """Normally distributed bf16 weights of a shape, on a device; norms are 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16) * 0.02

    weights = _frame(shape, device)
    weights |= {name: torch.ones_like(value) for name, value in weights.items() if name.endswith("norm")}
    for name, size in expected_shapes(shape):
        weights[name] = normal(*size)
    weights["embed"] = normal(shape.vocab_size, shape.hidden_size)
    weights["lm_head"] = normal(shape.vocab_size, shape.hidden_size)
    return weights


def carry(
    config: TransformerConfig, weights: Weights, shape: TransformerConfig, device: torch.device
) -> tuple[TransformerConfig, Weights]:
    """Puts a small model into a larger shape.

    Args:
        config, weights: the small model, bf16, from `read_weights`.
        shape: the large one's sizes; its norm's eps and RoPE are replaced by what the small model needs.
        device: where the large weights are made.
    Returns the carrier's configuration and its weights, bfloat16.
    Raises FourfoldError when the small model does not fit.
    """
    _check_fit(config, shape)
    small, large = config.hidden_size, shape.hidden_size
    norm_scale = (small / large) ** 0.5
    heads = _HeadPlaces(config, shape, device)
    result = _frame(shape, device)
    for name, size in expected_shapes(shape):
        result[name] = torch.zeros(size, dtype=torch.bfloat16, device=device)
    hidden = torch.arange(small, device=device)
    inner = torch.arange(config.intermediate_size, device=device)
    for i in range(config.num_hidden_layers):
        source = {name: _read(weights, f"layers.{i}.{name}", device) for name in _LAYER if _has(weights, i, name)}
        place = f"layers.{i}"
        for norm in ("input_norm", "post_norm"):
            result[f"{place}.{norm}"][:small] = source[norm] * norm_scale
        rows = heads.qkv
        result[f"{place}.qkv.weight"][rows[:, None], hidden] = _bf16(source["qkv.weight"] * heads.scale[:, None])
        if "qkv.bias" in source:
            result[f"{place}.qkv.bias"][rows] = _bf16(source["qkv.bias"] * heads.scale)
        result[f"{place}.o.weight"][hidden[:, None], heads.o] = _bf16(source["o.weight"])
        gate_up = torch.cat((inner, inner + shape.intermediate_size))
        result[f"{place}.gate_up.weight"][gate_up[:, None], hidden] = _bf16(source["gate_up.weight"])
        result[f"{place}.down.weight"][hidden[:, None], inner] = _bf16(source["down.weight"])
    tokens = config.vocab_size
    embedding = _read(weights, "embed", device)
    result["embed"][:tokens, :small] = embedding
    result["embed"][:, small] = CONSTANT
    result["norm"][:small] = _read(weights, "norm", device) * norm_scale
    result["norm"][small] = ENLARGED
    result["lm_head"][:tokens, :small] = _read(weights, "lm_head", device) if "lm_head" in weights else embedding
    result["lm_head"][tokens:, small] = LOW
    changes: dict[str, Any] = {"rms_norm_eps": config.rms_norm_eps * small / large, "rope_theta": config.rope_theta}
    changes |= {"rope_scaling": config.rope_scaling, "max_position_embeddings": config.max_position_embeddings}
    return replace(shape, **changes), result


def carry_drafter(drafter: Redrafter, shape: TransformerConfig) -> Redrafter:
    """A small model's drafter for its carrier: the same drafts at the cost of a drafter of the large width.

    Raises FourfoldError for a drafter whose exit_dim is not 2 x hidden_size.
    """
    small, config = drafter.config.hidden_size, drafter.config
    if config.has_input_proj or config.draft_vocab_size is None:
        raise FourfoldError("only a drafter with exit_dim = 2 x hidden_size and a draft vocabulary can be carried")
    large = shape.hidden_size
    wide = replace(config, vocab_size=shape.vocab_size, hidden_size=large, exit_dim=2 * large)
    result = Redrafter(wide, drafter.draft_to_target)
    state = drafter.state_dict()
    both = torch.cat((torch.arange(small), torch.arange(small) + large))
    for name, value in result.state_dict().items():
        value.zero_()
        columns = torch.arange(small) if name.startswith("rnn") else both
        rows = torch.arange(config.num_logits) if name == f"lm_head.{config.num_draft_layers}.weight" else columns
        source = state[name].to(value.dtype).cpu()
        if value.ndim == 1:
            value[columns] = source
        else:
            value[rows[:, None], columns] = source
    return result.requires_grad_(False)


def random_drafter(shape: TransformerConfig, draft_vocab_size: int, num_draft_layers: int = 2) -> RedrafterConfig:
    """The shape of the recipe's drafter for a model, with a draft vocabulary."""
    sizes = (shape.vocab_size, shape.hidden_size, 2 * shape.hidden_size, num_draft_layers)
    return RedrafterConfig(*sizes, draft_vocab_size=draft_vocab_size)


_LAYER = ("input_norm", "post_norm", "qkv.weight", "qkv.bias", "o.weight", "gate_up.weight", "down.weight")


class _HeadPlaces:
    """Where the small model's query, key and value rows go, and the columns that read the attention's result."""

    def __init__(self, config: TransformerConfig, shape: TransformerConfig, device: torch.device) -> None:
        ratio = shape.head_dim // config.head_dim
        pair = torch.arange(config.head_dim // 2, device=device) * ratio
        inside = torch.cat((pair, pair + shape.head_dim // 2))
        kv = torch.arange(config.num_key_value_heads, device=device)
        group, wide = (c.num_attention_heads // c.num_key_value_heads for c in (config, shape))
        query = (kv[:, None] * wide + torch.arange(group, device=device)).flatten()
        key = shape.num_attention_heads + kv
        rows = torch.cat((query, key, key + shape.num_key_value_heads))
        self.qkv = (rows[:, None] * shape.head_dim + inside).flatten()
        self.o = (query[:, None] * shape.head_dim + inside).flatten()
        queries = config.num_attention_heads * config.head_dim
        self.scale = torch.ones(len(self.qkv), device=device)
        self.scale[:queries] = ratio**0.5


def _check_fit(config: TransformerConfig, shape: TransformerConfig) -> None:
    group, wide = (c.num_attention_heads // c.num_key_value_heads for c in (config, shape))
    fits = [
        config.hidden_size < shape.hidden_size,
        config.intermediate_size <= shape.intermediate_size,
        config.num_hidden_layers <= shape.num_hidden_layers,
        config.num_key_value_heads <= shape.num_key_value_heads,
        config.vocab_size <= shape.vocab_size,
        group <= wide,
        shape.head_dim % config.head_dim == 0,
    ]
    if not all(fits):
        given, wanted = (
            f"{c.num_hidden_layers} layers, width {c.hidden_size}, {c.num_attention_heads} / {c.num_key_value_heads} "
            f"heads x {c.head_dim}"
            for c in (config, shape)
        )
        raise FourfoldError(f"a model of {given} does not fit into {wanted}")


def _frame(shape: TransformerConfig, device: torch.device) -> Weights:
    """Zeros for all that is no matrix of a layer: embeddings, norms and, as Qwen2 has them, biases."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.bfloat16, device=device)

    weights = {name: zeros(shape.vocab_size, shape.hidden_size) for name in ("embed", "lm_head")}
    weights["norm"] = zeros(shape.hidden_size)
    rows = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    for i in range(shape.num_hidden_layers):
        weights |= {f"layers.{i}.{norm}": zeros(shape.hidden_size) for norm in ("input_norm", "post_norm")}
        weights[f"layers.{i}.qkv.bias"] = zeros(rows)
    return weights


def _has(weights: Weights, layer: int, name: str) -> bool:
    return f"layers.{layer}.{name}" in weights


def _read(weights: Weights, name: str, device: torch.device) -> Tensor:
    return weights[name].to(device).float()


def _bf16(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16)
