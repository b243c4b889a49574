"""Turns a GGUF file into a Hugging Face checkpoint directory with bfloat16 weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from fourfold.errors import FourfoldError
from fourfold.model.gguf import GgufFile
from fourfold.model.gguf_tokenizer import gguf_tokenizer
from fourfold.progress import progress

_ARCHITECTURES = {"llama": (LlamaConfig, "LlamaForCausalLM"), "qwen2": (Qwen2Config, "Qwen2ForCausalLM")}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(path: Path, directory: Path) -> dict[str, Any]:
    """Writes config, weights, tokenizer and generation config; returns the file's name and licence for the manifest.

    Raises FourfoldError when the architecture, a tensor or the tokenizer is one that is not known here.
    """
    file = GgufFile(path)
    try:
        tokenizer = gguf_tokenizer(file.metadata)
        config = gguf_config(file)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        # Entries that are missing, of another kind, or beyond the vocabulary that the file itself states.
        reason = " ".join(repr(error).split())
        raise FourfoldError(f"{path.name}: its metadata do not make a model ({reason}); choose another file") from None
    weights: dict[str, torch.Tensor] = {}
    with progress("convert GGUF", len(file.tensors), "tensors") as task:
        for name in file.tensors:
            # np.require copies what is a view of the file: torch wants memory that it may write to.
            values = np.require(_values(file, name, config), requirements=["C", "W"])
            weights[tensor_name(name)] = torch.from_numpy(values).to(torch.bfloat16)
            task.advance()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    end_ids = sorted({end for end in ends if end is not None})
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end_ids, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    return {f"model_{key}": file.metadata.get(f"general.{key}") for key in ("name", "license")}


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """The model's configuration as transformers writes it. Raises FourfoldError for what this package cannot run."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise FourfoldError(f"{file.path.name}: architecture {architecture!r}; known are {', '.join(_ARCHITECTURES)}")
    scaling = [key for key in metadata if key.startswith(f"{architecture}.rope.scaling.")]
    if scaling or "rope_freqs.weight" in file.tensors:
        raise FourfoldError(f"{file.path.name}: RoPE scaling cannot be read from GGUF; use the model's hub repository")

    def entry(key: str) -> Any:
        try:
            return metadata[f"{architecture}.{key}"]
        except KeyError:
            raise FourfoldError(f"{file.path.name}: no {architecture}.{key} in its metadata") from None

    def token(key: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{key}_token_id")

    kind, name = _ARCHITECTURES[architecture]
    hidden, heads = entry("embedding_length"), entry("attention.head_count")
    # The file holds float32 values of short decimals: 9.99999975e-06 was 1e-05.
    values: dict[str, Any] = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": entry("feed_forward_length"),
        "num_hidden_layers": entry("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "max_position_embeddings": entry("context_length"),
        "rms_norm_eps": _short(entry("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding") if token("padding") is not None else token("eos"),
        "architectures": [name],
        "dtype": "bfloat16",
    }
    if architecture == "llama":
        values["head_dim"] = metadata.get("llama.attention.key_length", hidden // heads)
    return kind(**values)


def _short(value: float) -> float:
    return float(np.format_float_scientific(np.float32(value)))


def tensor_name(name: str) -> str:
    """Name of a GGUF tensor in a Llama or Qwen2 checkpoint of transformers. Raises FourfoldError for others."""
    stem, _, suffix = name.rpartition(".")
    block = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        block = f"model.layers.{layer}."
    if stem not in _TENSORS or suffix not in ("weight", "bias"):
        raise FourfoldError(f"tensor {name} belongs to no Llama or Qwen2 model")
    return f"{block}{_TENSORS[stem]}.{suffix}"


def _values(file: GgufFile, name: str, config: PretrainedConfig) -> NDArray[np.float32]:
    values = file.tensor(name)
    if config.model_type != "llama" or (".attn_q." not in name and ".attn_k." not in name):
        return values
    # GGUF's Llama interleaves the two halves of each head that rotary embedding pairs; transformers keeps them apart.
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
