"""Reads a Hugging Face checkpoint (bf16, FP8 or int8) into fused weights, and fused weights into a Transformer.

Fused names, also the format of an engine's `model.safetensors`: `embed`, `norm`, `lm_head` (absent when tied),
`layers.{i}.input_norm`, `layers.{i}.post_norm`, and for qkv, o, gate_up and down
`layers.{i}.{name}.{weight,bias,weight_scale,input_scale}`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourfold.errors import FourfoldError
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.linear import LinearWeights, make_linear, pack_linear, round_lm_head
from fourfold.modeling.norm import RmsNorm
from fourfold.modeling.transformer import Layer, Transformer

Weights = dict[str, Tensor]
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8_wo": torch.int8}


class _Reader:
    """Tensors of all safetensors files of a directory, by name, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FourfoldError(f"{directory}: no .safetensors file")
        try:
            self._files = [safe_open(file, framework="pt") for file in files]
        except SafetensorError as error:
            raise FourfoldError(f"{directory}: broken weights ({error}); make the checkpoint again") from None
        self._place = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __call__(self, name: str) -> Tensor:
        if name not in self._place:
            raise FourfoldError(f"{self.directory}: tensor {name} is missing")
        return self._place[name].get_tensor(name)


def stored_precision(weights: Weights) -> str:
    """`bf16`, `fp8` or `int8_wo`, from the decoder's tensors themselves.

    Raises FourfoldError when layers differ: a checkpoint that is quantised in part must not pass for a whole one.
    """
    found = {tensor.dtype for name, tensor in weights.items() if name.endswith(".weight")}
    wide = {torch.float32: torch.bfloat16, torch.float16: torch.bfloat16}
    found = {wide.get(dtype, dtype) for dtype in found}
    if len(found) != 1:
        raise FourfoldError(f"the decoder's weights have several dtypes: {', '.join(sorted(map(str, found)))}")
    (dtype,) = found
    names = {stored: name for name, stored in STORED.items()}
    if dtype not in names:
        raise FourfoldError(f"the decoder's weights are {dtype}; expected one of {', '.join(map(str, names))}")
    return names[dtype]


def read_weights(directory: Path) -> tuple[TransformerConfig, Weights]:
    """Reads a checkpoint and fuses its layers, on the CPU, in the dtypes that are stored.

    Raises FourfoldError for a tensor that is missing or has a wrong shape, and for an unsupported architecture.
    """
    config = TransformerConfig.from_huggingface(directory / "config.json")
    read = _Reader(directory)
    weights: Weights = {"embed": read("model.embed_tokens.weight"), "norm": read("model.norm.weight")}
    if not config.tie_word_embeddings:
        weights["lm_head"] = read("lm_head.weight")
    for i in range(config.num_hidden_layers):
        source, target = f"model.layers.{i}", f"layers.{i}"
        weights[f"{target}.input_norm"] = read(f"{source}.input_layernorm.weight")
        weights[f"{target}.post_norm"] = read(f"{source}.post_attention_layernorm.weight")
        for name, parts in FUSED.items():
            fused = _fuse(read, [f"{source}.{part}" for part in parts])
            weights.update({f"{target}.{name}.{key}": tensor for key, tensor in fused.items()})
    _check_shapes(directory, config, weights)
    return config, weights


def _fuse(read: _Reader, parts: list[str]) -> Weights:
    """Stacks the rows of several linear layers that read the same input."""
    weights = [read(f"{part}.weight") for part in parts]
    fused = {"weight": _stack(weights)}
    if f"{parts[0]}.bias" in read:
        fused["bias"] = torch.cat([read(f"{part}.bias") for part in parts])
    if weights[0].dtype in (torch.float8_e4m3fn, torch.int8):
        scales = [read(f"{part}.weight_scale").float() for part in parts]
        same = all(scale.numel() == 1 and torch.equal(scale, scales[0]) for scale in scales)
        rows = [scale.expand(len(weight)) for scale, weight in zip(scales, weights, strict=True)]
        fused["weight_scale"] = scales[0].reshape(()).clone() if same else torch.cat(rows)
    if weights[0].dtype == torch.float8_e4m3fn:
        inputs = [read(f"{part}.input_scale").float().reshape(()) for part in parts]
        # The layers see the same input; if their scales differ all the same, the widest range holds for all.
        fused["input_scale"] = torch.stack(inputs).max()
    return fused


def _stack(weights: list[Tensor]) -> Tensor:
    # float8 has no concatenation of its own on every device: the bytes are stacked.
    dtype = weights[0].dtype
    if dtype != torch.float8_e4m3fn:
        return torch.cat(weights)
    return torch.cat([weight.view(torch.uint8) for weight in weights]).view(dtype)


def expected_shapes(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Fused weight name and its [out, in] shape, for every linear layer of the decoder."""
    attention = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    for i in range(config.num_hidden_layers):
        yield f"layers.{i}.qkv.weight", (attention + 2 * kv, config.hidden_size)
        yield f"layers.{i}.o.weight", (config.hidden_size, attention)
        yield f"layers.{i}.gate_up.weight", (2 * config.intermediate_size, config.hidden_size)
        yield f"layers.{i}.down.weight", (config.hidden_size, config.intermediate_size)


def _check_shapes(directory: Path, config: TransformerConfig, weights: Weights) -> None:
    for name, shape in (("embed", (config.vocab_size, config.hidden_size)), *expected_shapes(config)):
        if tuple(weights[name].shape) != shape:
            raise FourfoldError(f"{directory}: {name} is {tuple(weights[name].shape)}, expected {shape}")


def decoder_bytes(config: TransformerConfig, precision: str) -> int:
    """Bytes that the decoder's linear weights must take in a precision (scales and biases not counted)."""
    item = torch.empty((), dtype=STORED[precision]).element_size()
    return sum(rows * columns for _, (rows, columns) in expected_shapes(config)) * item


def check_precision(weights: Weights, config: TransformerConfig, precision: str) -> None:
    """Makes sure that the weights are what they are said to be, in dtype and in bytes. Raises FourfoldError."""
    stored = stored_precision(weights)
    if stored != precision:
        raise FourfoldError(f"the checkpoint holds {stored} weights, {precision} expected")
    held = sum(weights[name].nbytes for name, _ in expected_shapes(config))
    if precision != "bf16" and held != decoder_bytes(config, precision):
        raise FourfoldError(f"the decoder's weights take {held} bytes, {decoder_bytes(config, precision)} expected")


def build_transformer(
    config: TransformerConfig,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8_lm_head: bool = False,
) -> Transformer:
    """Puts fused weights on a device. `weights` is emptied on the way, so that memory is held once.

    With `fp8_lm_head`, the output matrix is rounded to FP8 (`round_lm_head`, which says what it raises).
    """

    def take(name: str) -> Tensor:
        return weights.pop(name).to(device, dtype)

    def linear(name: str) -> LinearWeights:
        return LinearWeights(
            weights.pop(f"{name}.weight"),
            weights.pop(f"{name}.bias", None),
            weights.pop(f"{name}.weight_scale", None),
            weights.pop(f"{name}.input_scale", None),
        )

    def norm(name: str) -> RmsNorm:
        return RmsNorm(take(name), config.rms_norm_eps)

    def layer(i: int) -> Layer:
        prefix = f"layers.{i}"
        made = {name: make_linear(linear(f"{prefix}.{name}"), device, dtype) for name in FUSED}
        return Layer(input_norm=norm(f"{prefix}.input_norm"), post_norm=norm(f"{prefix}.post_norm"), **made)

    # Packing for a CPU is work for one core at a time: several layers are packed at once.
    with ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
        layers = list(pool.map(layer, range(config.num_hidden_layers)))
    embedding = weights.pop("embed").to(device)
    head = weights.pop("lm_head", embedding).to(device, dtype)
    lm_head = round_lm_head(head) if fp8_lm_head else pack_linear(head)
    return Transformer(config, embedding, layers, norm("norm"), lm_head, device, dtype)


def resolve_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one, else the CPU. Raises FourfoldError when the device is absent or unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise FourfoldError(f"device {name}: not known here; use auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FourfoldError("device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu or auto")
    return device


def check_device(device: torch.device, precision: str, *, fp8_lm_head: bool = False) -> None:
    """Raises FourfoldError when a device cannot compute in a precision: FP8 needs a GPU with FP8 units, or a CPU."""
    if precision == "fp8":
        check_fp8(device, "precision fp8", "use precision int8_wo or bf16")
    if fp8_lm_head:
        check_fp8(device, "fp8_lm_head", "set it to false")


def check_fp8(device: torch.device, what: str, remedy: str) -> None:
    """Raises FourfoldError naming what wants FP8, and the remedy, on a GPU without FP8 units."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise FourfoldError(
            f"{what} needs a GPU of compute capability 8.9 or higher, {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}; {remedy}"
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """What activations are computed in: float32 on a CPU (few have fast bfloat16), bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def cache_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """What `kv_cache_dtype`, auto or fp8, means: None for the model's dtype. Raises FourfoldError without FP8."""
    if wanted == "auto":
        return None
    check_fp8(device, "kv_cache_dtype fp8", "set it to auto")
    return torch.float8_e4m3fn


def load_transformer(
    directory: Path, device: str = "auto", dtype: torch.dtype | None = None, *, fp8_lm_head: bool = False
) -> Transformer:
    """Loads a checkpoint directory for inference, the output matrix in FP8 if asked for. Raises FourfoldError."""
    config, weights = read_weights(directory)
    place = resolve_device(device)
    check_device(place, stored_precision(weights), fp8_lm_head=fp8_lm_head)
    return build_transformer(config, weights, place, dtype or compute_dtype(place), fp8_lm_head=fp8_lm_head)
