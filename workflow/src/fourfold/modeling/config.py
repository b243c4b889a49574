"""Shape of a decoder-only transformer, read from a Hugging Face `config.json`."""

import json
import math
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
    def from_huggingface(cls, path: Path, place: str | None = None) -> "TransformerConfig":
        """Reads `config.json` of a Llama or Qwen2 checkpoint, with RoPE in either of transformers' layouts.

        Args:
            path: the file.
            place: what the messages call it, if not by its path.
        Raises FourfoldError for a file that cannot be read, another architecture, sizes that cannot be, or an option
        that the model's code does not have.
        """
        try:
            values = _object(json.loads(path.read_text(encoding="utf-8")), "the file")
            return cls._read(values)
        except OSError as error:
            reason = str(error.strerror)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
        raise FourfoldError(f"{place or path}: {reason}")

    @classmethod
    def _read(cls, values: dict[str, Any]) -> "TransformerConfig":
        """Raises ValueError that names the key."""
        named = values.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else "none"
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture} is not supported, only {', '.join(ARCHITECTURES)}")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {values['hidden_act']} is not supported, only silu")
        if architecture == "Qwen2ForCausalLM" and values.get("use_sliding_window"):
            raise ValueError("use_sliding_window is not supported; set it to false")
        hidden, heads = _positive(values, "hidden_size"), _positive(values, "num_attention_heads")
        kv_heads = _positive(values, "num_key_value_heads", heads)
        head_dim = _positive(values, "head_dim", hidden // heads or None)
        if heads % kv_heads:
            raise ValueError(f"{heads} num_attention_heads are no multiple of {kv_heads} num_key_value_heads")
        if head_dim % 2 or (values.get("head_dim") is None and hidden % heads):
            raise ValueError(f"hidden_size {hidden} and {heads} num_attention_heads make no heads of an even width")
        theta, scaling = _rope(values)
        return cls(
            architecture=architecture,
            vocab_size=_positive(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(values, "intermediate_size"),
            num_hidden_layers=_positive(values, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(values, "rms_norm_eps", kind=float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_positive(values, "max_position_embeddings"),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        )


ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Types of RoPE scaling, and the numbers that each needs."""


def _rope(values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE's base and its scaling. Raises ValueError."""
    rope = dict(_object(values.get("rope_parameters") or values.get("rope_scaling") or {}, "rope_parameters"))
    theta = rope.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    if kind not in tuple(ROPE_KEYS):
        raise ValueError(f"rope type {kind} is not supported, only {', '.join(ROPE_KEYS)}")
    for key in ROPE_KEYS[kind]:
        _positive(rope, key, kind=float)
    theta = _positive({"rope_theta": theta}, "rope_theta", kind=float)
    return theta, None if kind == "default" else {"rope_type": kind, **rope}


def _positive(values: dict[str, Any], key: str, default: Any = None, kind: type = int) -> Any:
    """A size, or with kind float any positive number, as the file has it. Raises ValueError."""
    value = default if values.get(key) is None else values[key]
    known = isinstance(value, int) if kind is int else isinstance(value, int | float) and math.isfinite(value)
    if not known or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key} is {value!r}, a positive {'whole ' if kind is int else ''}number is expected")
    return kind(value)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, an object with keys is expected")
    return value
