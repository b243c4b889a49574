"""Broken TensorRT-LLM checkpoints, and drafters that do not fit: each refused in one line that names the place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refused import fourfold
from safetensors.torch import load_file, save_file
from tiny_trtllm import make_checkpoint, make_drafter, merge_settings

from fourfold.config.stages import MergeStage
from fourfold.errors import FourfoldError
from fourfold.trtllm.merge import merge
from fourfold.trtllm.validate import validate_checkpoint

Break = Callable[[Path], object]
SCALE = "transformer.layers.0.mlp.fc.activation_scaling_factor"
QKV = "transformer.layers.1.attention.qkv"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint of FP8 Qwen2 for two ranks. Tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    _, base = make_checkpoint(folder, "qwen2", "fp8", 2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    (folder / "merged").mkdir()
    merge(base, make_drafter(folder / "drafter"), merge_settings(2), folder / "merged")
    return folder


def key(name: str, value: Any = ...) -> Break:
    """Changes a key of config.json, dots for nesting; without a value it goes."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if value is ...:
            section.pop(last)
        else:
            section[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor] | None, rank: int = 1) -> Break:
    """Changes a tensor of a rank; with None it goes."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / f"rank{rank}.safetensors")
        old = tensors.pop(name, torch.ones(1))
        save_file(tensors | ({} if make is None else {name: make(old)}), folder / f"rank{rank}.safetensors")

    return change


def cut(folder: Path) -> None:
    content = (folder / "rank1.safetensors").read_bytes()
    (folder / "rank1.safetensors").write_bytes(content[: len(content) // 2])


MISSING = [
    "architecture",
    "dtype",
    "logits_dtype",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "norm_epsilon",
    "position_embedding_type",
    "max_position_embeddings",
    "rotary_base",
    "rotary_scaling",
    "attn_bias",
    "mlp_bias",
    "use_parallel_embedding",
    "mapping",
    "mapping.tp_size",
    "quantization",
    "quantization.quant_algo",
    "qwen_type",
    "seq_length",
    "base_model_architecture",
    "redrafter_exit_dim",
    "redrafter_num_beams",
    "redrafter_greedy_search",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_key_is_named(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made / "merged", tmp_path / "checkpoint"))
    key(name)(folder)
    with pytest.raises(FourfoldError, match=rf"config\.json: {name} is missing, and TensorRT-LLM would"):
        validate_checkpoint(folder)


BROKEN: dict[str, tuple[Break, str]] = {
    "ModelOpt's class name": (key("architecture", "QWenForCausalLM"), "architecture is 'QWenForCausalLM', Llama"),
    "learned positions": (key("position_embedding_type", "learned_absolute"), "rope_gpt_neox is expected"),
    "another activation": (key("hidden_act", "gelu"), "hidden_act is 'gelu', silu is expected"),
    "another Qwen": (key("qwen_type", "qwen3"), "qwen_type is 'qwen3', qwen2 is expected"),
    "no base for RoPE": (key("rotary_base", 0), "rotary_base is 0, a positive number is expected"),
    "YaRN": (key("rotary_scaling", {"type": "yarn", "factor": 4.0}), "of type linear or llama3 is expected"),
    "half of llama3": (key("rotary_scaling", {"type": "llama3", "factor": 4.0}), r"low_freq_factor is None"),
    "a size in words": (key("hidden_size", "64"), "hidden_size is '64', a positive whole number is expected"),
    "a flag as a number": (key("mlp_bias", 0), "mlp_bias is 0, true or false is expected"),
    "pipeline parallel": (key("mapping.pp_size", 2), "only tensor parallelism is supported"),
    "another world": (key("mapping.world_size", 4), "world_size must equal tp_size"),
    "heads that are not shared": (key("num_attention_heads", 5), "which mapping.tp_size 2 does not divide"),
    "an odd vocabulary with a drafter": (key("vocab_size", 319), "vocab_size is 319, which mapping.tp_size 2 does not"),
    "a drafter of another width": (key("redrafter_hidden_size", 32), "redrafter_hidden_size is 32, the model's 64"),
    "another base": (key("base_model_architecture", "LlamaForCausalLM"), "Qwen2ForCausalLM is expected"),
    "another algorithm": (key("quantization.quant_algo", "NVFP4"), "null, FP8 or W8A16 is expected"),
    "an FP8 cache": (key("quantization.kv_cache_quant_algo", "FP8"), "kv_cache_quant_algo must be null"),
    "no list beside a drafter": (key("quantization.exclude_modules", None), "the drafter would be taken for FP8"),
    "an empty list": (key("quantization.exclude_modules", []), "does not name lm_head"),
    "a list without the drafter": (key("quantization.exclude_modules", ["lm_head"]), "does not name drafter,"),
    "a list of too much": (key("quantization.exclude_modules", ["*"]), "leaves out attention.dense, which is quantis"),
    "a list that is none": (key("quantization.exclude_modules", "lm_head"), "is no list of names"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: Expecting property name"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: a list, an object is expected"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "No such file"),
    "a missing rank": (lambda folder: (folder / "rank1.safetensors").unlink(), "rank1.safetensors: is missing"),
    "a rank too many": (
        lambda folder: shutil.copy(folder / "rank1.safetensors", folder / "rank2.safetensors"),
        "rank2.safetensors: is one too many",
    ),
    "half a rank": (cut, "rank1.safetensors: cut or broken"),
    "a missing tensor": (tensor(f"{QKV}.bias", None), rf"rank1.safetensors: tensor {QKV}.bias is missing"),
    "a drafter's missing tensor": (tensor("drafter.rnn_u.bias", None, 0), "tensor drafter.rnn_u.bias is missing"),
    "a tensor too many": (tensor("base_model.lm_head.weight", lambda old: old), "is not expected"),
    "another shape": (tensor(f"{QKV}.weight", lambda old: old[:-1].contiguous()), "expected F8_E4M3 .64, 64"),
    "another dtype": (
        tensor("lm_head.weight", lambda old: old.half()),
        "lm_head.weight is F16 .160, 64., expected BF16",
    ),
    "a scale without its dimension": (tensor(SCALE, lambda old: old.reshape(())), r"is F32 \[\], expected F32 \[1\]"),
    "a scale of zero": (tensor(SCALE, torch.zeros_like), f"{SCALE} is 0.0, a positive number is expected"),
    "a NaN for a scale": (tensor(SCALE, lambda old: old * float("nan")), f"{SCALE} is nan, a positive number"),
    "scales that differ": (tensor(SCALE, lambda old: old * 2), f"{SCALE} is .*, on another rank "),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_line(made: Path, tmp_path: Path, change: Break, message: str) -> None:
    folder = Path(shutil.copytree(made / "merged", tmp_path / "checkpoint"))
    assert fourfold("check-checkpoint", folder)[0] == 0
    change(folder)
    code, text = fourfold("check-checkpoint", folder)
    assert code == 1
    with pytest.raises(FourfoldError, match=message) as refused:
        validate_checkpoint(folder)
    assert text.splitlines()[-1] == f"error: {refused.value}"


def test_int8_needs_its_list_only_beside_a_drafter(tmp_path: Path) -> None:
    """ModelOpt writes none, and then TensorRT-LLM's own holds."""
    _, base = make_checkpoint(tmp_path, "llama", "int8_wo", 1)
    key("quantization.exclude_modules", None)(base)
    validate_checkpoint(base)
    refuse(base, make_drafter(tmp_path / "drafter"), merge_settings(1), tmp_path, "exclude_modules is null")
    key("quantization.exclude_modules", [])(base)
    with pytest.raises(FourfoldError, match="does not name lm_head"):
        validate_checkpoint(base)


def refuse(base: Path, drafter: Path, settings: MergeStage, folder: Path, message: str) -> None:
    """Merging must end in a line with `message`, before anything is written."""
    output = folder / "refused"
    output.mkdir()
    with pytest.raises(FourfoldError, match=message) as refused:
        merge(base, drafter, settings, output)
    assert "\n" not in str(refused.value)
    assert not list(output.iterdir())


UNFIT: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], str]] = {
    "a draft vocabulary": ("bf16", 1, {}, {"draft_vocab_size": 32}, "drafts among 32 tokens, .*draft_vocab_size null"),
    "another width": ("bf16", 1, {}, {"hidden_size": 32, "exit_dim": 64}, "hidden_size is 32, the model's 64"),
    "another vocabulary": ("bf16", 1, {}, {"vocab_size": 321}, "vocab_size is 321, the model's 320"),
    "a projection beside FP8": ("fp8", 1, {}, {"exit_dim": 96}, "exit_dim is 96; .* twice the hidden size, 128"),
    "a vocabulary that is not shared": (
        "bf16",
        2,
        {"vocab_size": 321},
        {"vocab_size": 321},
        "vocab_size is 321, which 2 ranks cannot share evenly",
    ),
    "blocks that are not shared": ("bf16", 4, {}, {"exit_dim": 98}, "exit_dim is 98, which 4 ranks cannot share"),
    "half precision": ("bf16", 1, {}, {"dtype": torch.float16}, "is torch.float16, the base torch.bfloat16"),
}


@pytest.mark.parametrize(("precision", "ranks", "changes", "shape", "message"), UNFIT.values(), ids=UNFIT)
def test_a_drafter_that_does_not_fit_is_refused(
    precision: str, ranks: int, changes: dict[str, Any], shape: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, base = make_checkpoint(tmp_path, "llama", precision, ranks, **changes)
    refuse(base, make_drafter(tmp_path / "drafter", **shape), merge_settings(ranks), tmp_path, message)


def test_other_ranks_than_the_bases_are_refused(made: Path, tmp_path: Path) -> None:
    refuse(made / "checkpoint", made / "drafter", merge_settings(4), tmp_path, "split over 2 ranks, tensor_parallel_s")


def test_a_second_drafter_is_refused(made: Path, tmp_path: Path) -> None:
    refuse(made / "merged", made / "drafter", merge_settings(2), tmp_path, "ReDrafterForQWenLM has a drafter already")


def test_an_unsupported_architecture_is_refused(made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made / "checkpoint", tmp_path / "base"))
    key("architecture", "Qwen3ForCausalLM")(base)
    refuse(base, made / "drafter", merge_settings(2), tmp_path, "architecture is 'Qwen3ForCausalLM'")


def test_a_drafter_of_no_numbers_is_refused(made: Path, tmp_path: Path) -> None:
    drafter = Path(shutil.copytree(made / "drafter", tmp_path / "drafter"))
    tensors = load_file(drafter / "model.safetensors")
    tensors["rnn_u.bias"][3] = float("inf")
    save_file(tensors, drafter / "model.safetensors")
    refuse(made / "checkpoint", drafter, merge_settings(2), tmp_path, "rnn_u.bias holds a NaN or an infinity")
