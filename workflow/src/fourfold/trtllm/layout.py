"""The TensorRT-LLM checkpoint: what `config.json` and the tensors of each `rank{r}.safetensors` are.

A checkpoint for t GPUs has t files with tensors of the same names and shapes. Linear layers are split by rows (qkv, fc,
gate, lm_head, the embedding) or by columns (dense, proj); the rest is on every rank. Source: TensorRT-LLM's page
"TensorRT-LLM Checkpoint", and its loaders of 1.1 and 1.2.
"""

from typing import Any

from fourfold import __version__
from fourfold.errors import FourfoldError
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.redrafter import RedrafterConfig

CONFIG = "config.json"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""config.json's dtype → safetensors' name of it."""
ALGORITHMS = {"bf16": None, "fp8": "FP8", "int8_wo": "W8A16"}
"""Precision → quantization.quant_algo."""
EXCLUDED: dict[str, list[str] | None] = {
    "bf16": None,
    "fp8": ["lm_head"],
    # A list replaces TensorRT-LLM's own, so this repeats it. `null` would mean the same, but then there is no list that
    # could name a drafter, whose layers would be taken for int8.
    "int8_wo": [
        "*lm_head",
        "*router",
        "*vocab_embedding",
        "*position_embedding",
        "*block_embedding",
        "*shared_expert_gate",
    ],
}
"""Precision → quantization.exclude_modules: patterns of the modules that keep config.json's dtype."""
REDRAFTER = {"LlamaForCausalLM": "ReDrafterForLLaMALM", "Qwen2ForCausalLM": "ReDrafterForQWenLM"}
"""Architecture → that of the same model with a ReDrafter."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name → (safetensors dtype, shape)."""


def rank_file(rank: int) -> str:
    """Name of a rank's weights."""
    return f"rank{rank}.safetensors"


def check_split(model: TransformerConfig, tensor_parallel_size: int) -> None:
    """Raises FourfoldError when a model cannot be split over that many GPUs."""
    sizes = {"num_attention_heads": model.num_attention_heads, "intermediate_size": model.intermediate_size}
    for name, size in sizes.items():
        if size % tensor_parallel_size:
            raise FourfoldError(
                f"tensor_parallel_size is {tensor_parallel_size}, but the model's {name} is {size}, which it does not "
                "divide; choose one that does"
            )
    kv = model.num_key_value_heads
    if kv % tensor_parallel_size and tensor_parallel_size % kv:
        raise FourfoldError(
            f"tensor_parallel_size is {tensor_parallel_size}, but the model has {kv} num_key_value_heads; choose a "
            "divisor or a multiple of them"
        )


def checkpoint_config(
    model: TransformerConfig,
    precision: str,
    dtype: str,
    tensor_parallel_size: int,
    attn_bias: bool = False,
    mlp_bias: bool = False,
) -> dict[str, Any]:
    """Content of `config.json`, with every key for which TensorRT-LLM's default would be another model's.

    Args:
        model: the shape.
        precision: bf16, fp8 or int8_wo.
        dtype: of all that is not quantised: bfloat16, float16 or float32.
        tensor_parallel_size: number of ranks.
        attn_bias: whether attention has biases (Llama: all four layers; Qwen2: q, k and v, which always have).
        mlp_bias: whether the layers of the MLP have them.
    """
    config: dict[str, Any] = {
        "producer": {"name": "fourfold", "version": __version__},
        "architecture": model.architecture,
        "dtype": dtype,
        # As precise as sampling can use; ModelOpt's float16 has less range than bfloat16.
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_size": model.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rope_theta,
        # Releases differ in which of the two names they read.
        "rotary_scaling": model.rope_scaling and {"type": model.rope_scaling["rope_type"], **model.rope_scaling},
        "attn_bias": attn_bias,
        "mlp_bias": mlp_bias,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tensor_parallel_size, "tp_size": tensor_parallel_size, "pp_size": 1},
        "quantization": {
            "quant_algo": ALGORITHMS[precision],
            "kv_cache_quant_algo": None,
            "exclude_modules": EXCLUDED[precision],
        },
    }
    if model.architecture == "Qwen2ForCausalLM":
        # seq_length is read for all of Qwen's kinds and used for the first one alone.
        config |= {"qwen_type": "qwen2", "seq_length": 8192, "use_logn_attn": False, "tie_word_embeddings": False}
    return config


def expected_tensors(config: dict[str, Any]) -> Tensors:
    """Every tensor of a rank's file, the drafter's included.

    Args: config is a checked `config.json` (`validate.read_config`).
    """
    size = config["mapping"]["tp_size"]
    wide = DTYPES[config["dtype"]]
    fp8 = config["quantization"]["quant_algo"] == "FP8"
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"] // size, config["head_size"]
    query = config["num_attention_heads"] // size * head
    key_value = max(config["num_key_value_heads"] // size, 1) * head
    vocabulary = -(-config["vocab_size"] // size)
    shapes = {
        "attention.qkv": (query + 2 * key_value, hidden),
        "attention.dense": (hidden, query),
        "mlp.fc": (ffn, hidden),
        "mlp.gate": (ffn, hidden),
        "mlp.proj": (hidden, ffn),
    }
    tensors: Tensors = {
        "transformer.vocab_embedding.weight": (wide, (vocabulary, hidden)),
        "transformer.ln_f.weight": (wide, (hidden,)),
        "lm_head.weight": (wide, (vocabulary, hidden)),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.layers.{i}"
        for norm in ("input_layernorm", "post_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = (wide, (hidden,))
        for name, shape in shapes.items():
            tensors[f"{layer}.{name}.weight"] = ("F8_E4M3" if fp8 else wide, shape)
            if _has_bias(config, name):
                tensors[f"{layer}.{name}.bias"] = (wide, shape[:1])
            if fp8:
                # Shape [1] and not []: the loader compares with a parameter of one element.
                tensors[f"{layer}.{name}.weights_scaling_factor"] = ("F32", (1,))
                tensors[f"{layer}.{name}.activation_scaling_factor"] = ("F32", (1,))
    return tensors | _drafter_tensors(config, wide)


def _has_bias(config: dict[str, Any], linear: str) -> bool:
    if linear.startswith("mlp."):
        return bool(config["mlp_bias"])
    return bool(config["attn_bias"]) and (linear == "attention.qkv" or "qwen_type" not in config)


def _drafter_tensors(config: dict[str, Any], wide: str) -> Tensors:
    """The drafter's tensors on a rank: each split by rows, biases too. None without a drafter."""
    if config["architecture"] not in REDRAFTER.values():
        return {}
    size = config["mapping"]["tp_size"]
    drafter = drafter_config(config)
    width, hidden = drafter.exit_dim, drafter.hidden_size
    rows = {
        **({"input_proj": (width, 2 * hidden)} if drafter.has_input_proj else {}),
        **{f"layers.{k}.linear": (width, width) for k in range(drafter.num_draft_layers)},
        "lm_head": (drafter.vocab_size, width),
        **({"rnn_u": (hidden, hidden), "rnn_w": (hidden, hidden)} if drafter.rnn else {}),
    }
    tensors: Tensors = {}
    for name, (out, width) in rows.items():
        tensors[f"drafter.{name}.weight"] = (wide, (out // size, width))
        if name not in ("lm_head", "rnn_w"):
            tensors[f"drafter.{name}.bias"] = (wide, (out // size,))
    return tensors


def drafter_config(config: dict[str, Any]) -> RedrafterConfig:
    """Shape of a checkpoint's drafter. Raises FourfoldError for a size that cannot be."""
    return RedrafterConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["redrafter_hidden_size"],
        exit_dim=config["redrafter_exit_dim"],
        num_draft_layers=config["redrafter_num_layers"],
        rnn=config["redrafter_is_rnn"],
    )


def drafter_modules(drafter: RedrafterConfig) -> list[str]:
    """The drafter's modules by their full names, as quantization.exclude_modules must name them."""
    blocks = [f"drafter.layers.{k}" for k in range(drafter.num_draft_layers)]
    return [
        "drafter",
        "drafter.layers",
        "drafter.lm_head",
        *(["drafter.rnn_u", "drafter.rnn_w"] if drafter.rnn else []),
        *(["drafter.input_proj"] if drafter.has_input_proj else []),
        *blocks,
        *(f"{block}.linear" for block in blocks),
    ]
