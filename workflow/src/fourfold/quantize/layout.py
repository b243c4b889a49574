"""Which linear layers of a decoder are quantised, and which of them are computed as one."""

from collections.abc import Iterator

from transformers import PretrainedConfig

# Layers that read the same input and that an engine computes as one: in FP8 each group shares its weight scale.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# The embedding and the output layer keep the model's own precision, as in ModelOpt's FP8 recipe.
EXCLUDED = ("lm_head", "model.embed_tokens")


def linear_groups(config: PretrainedConfig) -> Iterator[tuple[str, ...]]:
    """Module names of the decoder's linear layers, grouped as engines fuse them."""
    for layer in range(config.num_hidden_layers):
        for group in FUSED:
            yield tuple(f"model.layers.{layer}.{name}" for name in group)


def linear_names(config: PretrainedConfig) -> list[str]:
    """Module names of all quantised linear layers."""
    return [name for group in linear_groups(config) for name in group]
