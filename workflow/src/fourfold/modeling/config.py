"""Shape of a decoder-only transformer, read from a Hugging Face `config.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class TransformerConfig:
    """What the model's code needs to know; names as in `transformers`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def kv_bytes_per_token(self) -> int:
        """Elements of key and value that one token keeps in all layers (multiply by the cache's item size)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_huggingface(cls, path: Path) -> "TransformerConfig":
        """Reads `config.json` of a Llama or Qwen2 checkpoint, with RoPE in either of transformers' layouts.

        Raises FourfoldError for another architecture or an option that the model's code does not have.
        """
        values = json.loads(path.read_text(encoding="utf-8"))
        architecture = (values.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise FourfoldError(
                f"{path}: architecture {architecture} is not supported, only {', '.join(ARCHITECTURES)}"
            )
        if values.get("hidden_act", "silu") != "silu":
            raise FourfoldError(f"{path}: hidden_act {values['hidden_act']} is not supported, only silu")
        if architecture == "Qwen2ForCausalLM" and values.get("use_sliding_window"):
            raise FourfoldError(f"{path}: use_sliding_window is not supported; set it to false")
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
        kind = rope.pop("rope_type", None) or rope.pop("type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise FourfoldError(f"{path}: rope type {kind} is not supported, only default, linear and llama3")
        heads = values["num_attention_heads"]
        return cls(
            architecture=architecture,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            rms_norm_eps=values["rms_norm_eps"],
            rope_theta=float(theta),
            rope_scaling=None if kind == "default" else {"rope_type": kind, **rope},
            max_position_embeddings=values["max_position_embeddings"],
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
