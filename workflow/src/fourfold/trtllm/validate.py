"""Checks a TensorRT-LLM checkpoint, whoever wrote it, before hours of building find out.

TensorRT-LLM's own loader fills a missing key with another model's default, only warns of a wrong dtype, and ignores a
tensor too many. Each of these is refused here.
"""

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fourfold.artifacts.tensors import read_header
from fourfold.errors import FourfoldError
from fourfold.trtllm.layout import (
    ALGORITHMS,
    CONFIG,
    DTYPES,
    REDRAFTER,
    drafter_config,
    drafter_modules,
    expected_tensors,
    rank_file,
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "max_position_embeddings",
)
_FLAGS = ("attn_bias", "mlp_bias")
_NUMBERS = ("norm_epsilon", "rotary_base")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "architecture": (*REDRAFTER, *REDRAFTER.values()),
    "dtype": tuple(DTYPES),
    "logits_dtype": ("float16", "float32"),
    "hidden_act": ("silu",),
    "position_embedding_type": ("rope_gpt_neox",),
    "use_parallel_embedding": (True,),
    "embedding_sharding_dim": (0,),
}
_QWEN: dict[str, tuple[Any, ...]] = {"qwen_type": ("qwen2",), "attn_bias": (True,)}
_DRAFTER_SIZES = (
    "redrafter_num_layers",
    "redrafter_hidden_size",
    "redrafter_exit_dim",
    "redrafter_num_beams",
    "redrafter_draft_len_per_beam",
)
_DRAFTER_FLAGS = ("redrafter_is_rnn", "redrafter_greedy_search")
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_QUANTIZED = {"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"}


def validate_checkpoint(directory: Path) -> dict[str, Any]:
    """Checks `config.json`, and names, dtypes, shapes and scales of every rank's tensors.

    Returns the configuration. Raises FourfoldError with the first thing that is wrong.
    """
    config = read_config(directory / CONFIG)
    ranks = config["mapping"]["tp_size"]
    meant = {rank_file(rank) for rank in range(ranks)}
    found = {path.name for path in directory.glob("rank*.safetensors")}
    for name in sorted(meant ^ found):
        what = "is missing" if name in meant else "is one too many"
        raise FourfoldError(f"{directory / name}: {what}: config.json says {ranks} ranks; write the checkpoint again")
    expected = expected_tensors(config)
    scales: dict[str, float] = {}
    for name in sorted(meant):
        _check_tensors(directory / name, expected)
        for scale, value in _read_scales(directory / name).items():
            if not (math.isfinite(value) and value > 0):
                raise FourfoldError(f"{directory / name}: {scale} is {value}, a positive number is expected")
            if scales.setdefault(scale, value) != value:
                raise FourfoldError(f"{directory / name}: {scale} is {value}, on another rank {scales[scale]}")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's `config.json`, with `head_size` filled in.

    Raises FourfoldError naming the key that is missing or that TensorRT-LLM would misread.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, an object is expected")
        _check_config(config)
    except OSError as error:
        raise FourfoldError(f"{path}: {error.strerror}; write the checkpoint first") from None
    except (ValueError, FourfoldError) as error:
        raise FourfoldError(f"{path}: {' '.join(str(error).split())}") from None
    return config


def _check_config(config: dict[str, Any]) -> None:
    """Raises ValueError or FourfoldError."""
    _check_values(config, _CHOICES)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        config.setdefault("head_size", hidden // heads)
    _check_types(config, sizes=_SIZES, flags=_FLAGS)
    for key in _NUMBERS:
        if not _is_positive(_get(config, key)):
            raise ValueError(f"{key} is {config[key]!r}, a positive number is expected")
    if config["architecture"] in ("Qwen2ForCausalLM", REDRAFTER["Qwen2ForCausalLM"]):
        _check_values(config, _QWEN)
        _check_types(config, sizes=("seq_length",), flags=("use_logn_attn",))
    _check_rotary_scaling(_get(config, "rotary_scaling"))
    drafts = config["architecture"] in REDRAFTER.values()
    if drafts:
        base = {redrafter: plain for plain, redrafter in REDRAFTER.items()}[config["architecture"]]
        _check_values(config, {"base_model_architecture": (base,)})
        _check_types(config, sizes=_DRAFTER_SIZES, flags=_DRAFTER_FLAGS)
        if config["redrafter_hidden_size"] != hidden:
            raise ValueError(f"redrafter_hidden_size is {config['redrafter_hidden_size']}, the model's {hidden}")
    _check_mapping(config, drafts)
    _check_quantization(config, drafts)


def _check_mapping(config: dict[str, Any], drafts: bool) -> None:
    mapping = _get(config, "mapping")
    if not isinstance(mapping, dict):
        raise ValueError("mapping is no object with world_size, tp_size and pp_size")
    _check_types(mapping, sizes=("world_size", "tp_size"), flags=(), where="mapping.")
    size = mapping["tp_size"]
    if mapping.get("pp_size", 1) != 1 or mapping["world_size"] != size:
        raise ValueError("mapping: only tensor parallelism is supported; world_size must equal tp_size, pp_size be 1")
    divided = ["num_attention_heads", "intermediate_size"]
    # Its loader splits the drafter's layers without padding, but expects the vocabulary padded.
    divided += ["vocab_size", "redrafter_exit_dim", "redrafter_hidden_size"] if drafts else []
    for key in divided:
        if config[key] % size:
            raise ValueError(f"{key} is {config[key]}, which mapping.tp_size {size} does not divide")
    kv = config["num_key_value_heads"]
    if config["num_attention_heads"] % kv or (kv % size and size % kv):
        raise ValueError(f"num_key_value_heads is {kv}, which fits neither the heads nor mapping.tp_size {size}")


def _check_quantization(config: dict[str, Any], drafts: bool) -> None:
    quantization = _get(config, "quantization")
    if not isinstance(quantization, dict):
        raise ValueError("quantization is no object with quant_algo, kv_cache_quant_algo and exclude_modules")
    algorithm = _get(quantization, "quant_algo", "quantization.")
    if algorithm not in ALGORITHMS.values():
        raise ValueError(f"quantization.quant_algo is {algorithm!r}, null, FP8 or W8A16 is expected")
    if quantization.get("kv_cache_quant_algo") is not None:
        raise ValueError("quantization.kv_cache_quant_algo must be null: a quantised KV cache is not supported")
    patterns = quantization.get("exclude_modules")
    if patterns is not None and not (isinstance(patterns, list) and all(isinstance(name, str) for name in patterns)):
        raise ValueError("quantization.exclude_modules is no list of names")
    if algorithm is None:
        return
    wide = drafter_modules(drafter_config(config)) if drafts else []
    if patterns is None and drafts:
        raise ValueError(f"quantization.exclude_modules is null, so the drafter would be taken for {algorithm}")
    # Without a list TensorRT-LLM excludes the output layer itself.
    for module in ["lm_head", *wide] if patterns is not None else []:
        if not any(fnmatchcase(module, pattern) for pattern in patterns or []):
            raise ValueError(f"quantization.exclude_modules does not name {module}, which is not quantised")
    for name in sorted(_QUANTIZED):
        if any(fnmatchcase(f"transformer.layers.0.{name}", pattern) for pattern in patterns or []):
            raise ValueError(f"quantization.exclude_modules leaves out {name}, which is quantised")


def _check_rotary_scaling(scaling: Any) -> None:
    if scaling is None:
        return
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rotary_scaling is {scaling!r}, null or an object of type linear or llama3 is expected")
    for key in _SCALING if kind == "llama3" else _SCALING[:1]:
        if not _is_positive(scaling.get(key)):
            raise ValueError(f"rotary_scaling.{key} is {scaling.get(key)!r}, a positive number is expected")


def _check_values(config: dict[str, Any], choices: dict[str, tuple[Any, ...]]) -> None:
    for key, allowed in choices.items():
        if _get(config, key) not in allowed:
            raise ValueError(f"{key} is {config[key]!r}, {' or '.join(map(str, allowed))} is expected")


def _check_types(config: dict[str, Any], sizes: tuple[str, ...], flags: tuple[str, ...], where: str = "") -> None:
    for key in sizes:
        value = _get(config, key, where)
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}{key} is {value!r}, a positive whole number is expected")
    for key in flags:
        if type(_get(config, key, where)) is not bool:
            raise ValueError(f"{where}{key} is {config[key]!r}, true or false is expected")


def _get(config: dict[str, Any], key: str, where: str = "") -> Any:
    if key not in config:
        raise ValueError(f"{where}{key} is missing, and TensorRT-LLM would take another model's default")
    return config[key]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_tensors(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    try:
        found = read_header(path)
    except ValueError as error:
        raise FourfoldError(f"{path}: cut or broken: {error}; write the checkpoint again") from None
    if difference := sorted(expected.keys() ^ found.keys()):
        kind = "is missing" if difference[0] in expected else "is not expected"
        raise FourfoldError(f"{path}: tensor {difference[0]} {kind} (of {len(difference)})")
    for name, (dtype, shape) in expected.items():
        given = (found[name]["dtype"], tuple(found[name]["shape"]))
        if given != (dtype, shape):
            raise FourfoldError(f"{path}: {name} is {given[0]} {list(given[1])}, expected {dtype} {list(shape)}")


def _read_scales(path: Path) -> dict[str, float]:
    with safe_open(path, framework="pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith("_scaling_factor")]  # noqa: SIM118
        return {name: float(torch.as_tensor(tensors.get_tensor(name))) for name in names}
