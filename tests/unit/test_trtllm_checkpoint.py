"""TensorRT-LLM checkpoints: the model's own bytes, rank by rank, and a drafter's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LLAMA3_ROPE
from tiny_trtllm import BIASED, as_bytes, make_checkpoint, make_drafter, merge_settings, rank_tensors, rebuild

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import write_jsonl
from fourfold.calibration.stage import build_calibration
from fourfold.config.model import TinyModel
from fourfold.config.problems import LocalProblems, Prompt, Splits
from fourfold.config.quantize import CalibrationSettings, QuantizeSettings
from fourfold.config.stages import CalibrationStage, ConvertStage, QuantizeStage
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.modeling.checkpoint import read_weights
from fourfold.problems.stage import fetch_problems
from fourfold.quantize.stage import quantize_model
from fourfold.trtllm.convert import convert_checkpoint
from fourfold.trtllm.convert import rank_tensors as split
from fourfold.trtllm.layout import check_split
from fourfold.trtllm.merge import merge
from fourfold.trtllm.validate import validate_checkpoint

TIED = {"tie_word_embeddings": True}
# 321 tokens: neither 2 nor 4 divides them. One key/value head for four ranks, and several for two.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TIED),
    "llama with biases, untied": ("llama", BIASED | {"vocab_size": 321}),
    "llama3 RoPE, wide heads": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "qwen2": ("qwen2", {"vocab_size": 321}),
    "qwen2, one key/value head": ("qwen2", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("precision", ["bf16", "int8_wo"])
@pytest.mark.parametrize("case", CASES)
def test_the_ranks_hold_the_models_bytes(case: str, precision: str, ranks: int, tmp_path: Path) -> None:
    architecture, changes = CASES[case]
    source, directory = make_checkpoint(tmp_path, architecture, precision, ranks, **changes)
    config = validate_checkpoint(directory)
    assert config["mapping"] == {"world_size": ranks, "tp_size": ranks, "pp_size": 1}
    expected = load_file(source / "model.safetensors")
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    rebuilt = rebuild(directory, config["num_hidden_layers"])
    assert rebuilt.keys() == expected.keys()
    for name, tensor in expected.items():
        assert rebuilt[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(as_bytes(rebuilt[name]), as_bytes(tensor)), name


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of a tiny Qwen2's FP8 checkpoint by ModelOpt."""
    root = tmp_path_factory.mktemp("quantized")
    model, problems, texts, fp8 = (root / name / "manifest.json" for name in ("model", "problems", "texts", "fp8"))
    fetch_model(TinyModel(source="tiny", architecture="qwen2"), model)
    rows = [{"problem": f"What is {i} + {i}?", "solution": f"It is {2 * i}", "answer": str(2 * i)} for i in range(90)]
    write_jsonl(root / "p.jsonl", rows)
    splits = Splits(train=9, calibration=3, benchmark=3)
    fetch_problems(LocalProblems(source="local", path=str(root / "p.jsonl"), splits=splits), problems)
    stage = CalibrationStage(calibration=CalibrationSettings(samples=3), prompt=Prompt())
    build_calibration(stage, model, problems, texts)
    settings = QuantizeStage(precision="fp8", quantize=QuantizeSettings(max_length=64, batch_size=3))
    quantize_model(settings, model, texts, fp8, "cpu")
    return fp8


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_hold_modelopts_bytes_and_scales(quantized: Path, ranks: int, tmp_path: Path) -> None:
    output = tmp_path / "fp8" / "manifest.json"
    convert_checkpoint(ConvertStage(precision="fp8", tensor_parallel_size=ranks), quantized, output)
    expected = load_file(quantized.parent / "model.safetensors")
    rebuilt = rebuild(output.parent, 2)
    assert rebuilt.keys() == {name for name in expected if not name.endswith("_scale")}
    for name, tensor in rebuilt.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(as_bytes(tensor), as_bytes(expected[name])), name
    assert {tensor.dtype for tensor in rebuilt.values()} == {torch.float8_e4m3fn, torch.bfloat16}
    fused = {"attention.qkv": "self_attn.v_proj", "attention.dense": "self_attn.o_proj"}
    fused |= {"mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
    for tensors in rank_tensors(output.parent):
        for theirs, ours in fused.items():
            for kind, scale in (("weights", "weight_scale"), ("activation", "input_scale")):
                value = tensors[f"transformer.layers.1.{theirs}.{kind}_scaling_factor"]
                assert value.shape == (1,)
                assert value.item() == expected[f"model.layers.1.{ours}.{scale}"].item()
    assert {path.name for path in (output.parent / "tokenizer").iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = json.loads((output.parent / "tokenizer" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read_manifest(output)["end_token_ids"] == [2]


def test_every_key_that_tensorrt_llm_would_guess_is_there(tmp_path: Path) -> None:
    """Among them those that ModelOpt's own export lacks under transformers 5."""
    _, directory = make_checkpoint(tmp_path, "qwen2", "fp8", 2, rope_theta=1e6)
    assert json.loads((directory / "config.json").read_text()) == {
        "producer": {"name": "fourfold", "version": "0.1.0"},
        "architecture": "Qwen2ForCausalLM",
        "qwen_type": "qwen2",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,
        "hidden_act": "silu",
        "norm_epsilon": 1e-6,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 512,
        "rotary_base": 1e6,
        "rotary_scaling": None,
        "attn_bias": True,
        "mlp_bias": False,
        "use_logn_attn": False,
        "seq_length": 8192,
        "tie_word_embeddings": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }


def test_rope_scaling_has_both_of_its_names(tmp_path: Path) -> None:
    _, directory = make_checkpoint(tmp_path, "llama", "bf16", 1, rope_parameters=LLAMA3_ROPE)
    config = validate_checkpoint(directory)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert config["rotary_scaling"] == {"type": "llama3", **scaling}
    assert config["rotary_base"] == LLAMA3_ROPE["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "num_attention_heads is 4, which it does not divide"),
        ({"intermediate_size": 98}, 4, "intermediate_size is 98"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}, 2, "3 num_key_value_heads"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(
    changes: dict[str, Any], ranks: int, message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "llama", "bf16", 1, **changes)
    model, _ = read_weights(tmp_path / "model")
    with pytest.raises(FourfoldError, match=message):
        check_split(model, ranks)


def test_scales_of_their_own_in_a_fused_layer_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", "fp8", 1)
    model, weights = read_weights(tmp_path / "model")
    weights["layers.1.qkv.weight_scale"] = torch.ones(128)
    with pytest.raises(FourfoldError, match=r"layers\.1\.qkv\.weight_scale: .* have different scales"):
        split(model, weights, 1, 0)


DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "bf16, projected": ("bf16", {"exit_dim": 96, "num_draft_layers": 1}),
    "int8, projected": ("int8_wo", {"exit_dim": 96}),
    "fp8, summed": ("fp8", {"rnn": False}),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("case", DRAFTERS)
def test_a_merged_checkpoint_holds_the_base_and_the_drafter(
    case: str, architecture: str, ranks: int, tmp_path: Path
) -> None:
    precision, shape = DRAFTERS[case]
    _, base = make_checkpoint(tmp_path, architecture, precision, ranks)
    drafter, merged = make_drafter(tmp_path / "drafter", **shape), tmp_path / "merged"
    merged.mkdir()
    merge(base, drafter, merge_settings(ranks, beams=2), merged)
    validate_checkpoint(merged)
    state = load_file(drafter / "model.safetensors")
    layers = shape.get("num_draft_layers", 2)
    names = {"drafter.lm_head.weight": f"lm_head.{layers}.weight"}
    for kind in ("weight", "bias"):
        names |= {f"drafter.layers.{k}.linear.{kind}": f"lm_head.{k}.linear.{kind}" for k in range(layers)}
        names |= {f"drafter.input_proj.{kind}": f"input_proj.{kind}"} if shape.get("exit_dim") else {}
    if shape.get("rnn", True):
        names |= {f"drafter.{name}": name for name in ("rnn_u.weight", "rnn_u.bias", "rnn_w.weight")}
    held = rank_tensors(merged)
    for tensors, before in zip(held, rank_tensors(base), strict=True):
        assert tensors.keys() - before.keys() == names.keys()
        assert all(torch.equal(as_bytes(tensors[name]), as_bytes(value)) for name, value in before.items())
    for theirs, ours in names.items():
        assert torch.equal(torch.cat([tensors[theirs] for tensors in held]), state[ours]), theirs


def test_the_merged_configuration_is_the_examples(tmp_path: Path) -> None:
    _, base = make_checkpoint(tmp_path, "qwen2", "fp8", 2)
    drafter, merged = make_drafter(tmp_path / "drafter"), tmp_path / "merged"
    merged.mkdir()
    merge(base, drafter, merge_settings(2, beams=2), merged)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, merged))
    added = {key: value for key, value in after.items() if before.get(key) != value}
    excluded = added.pop("quantization")["exclude_modules"]
    assert added == {
        "architecture": "ReDrafterForQWenLM",
        "base_model_architecture": "Qwen2ForCausalLM",
        "redrafter_num_layers": 2,
        "redrafter_hidden_size": 64,
        "redrafter_exit_dim": 128,
        "redrafter_is_rnn": True,
        "redrafter_num_beams": 2,
        "redrafter_draft_len_per_beam": 3,
        "redrafter_greedy_search": True,
    }
    assert excluded == [
        "lm_head",
        "drafter",
        "drafter.layers",
        "drafter.lm_head",
        "drafter.rnn_u",
        "drafter.rnn_w",
        "drafter.layers.0",
        "drafter.layers.1",
        "drafter.layers.0.linear",
        "drafter.layers.1.linear",
    ]


def test_a_float32_drafter_is_rounded_to_the_base(tmp_path: Path) -> None:
    """What recurrent-drafting saves is float32."""
    _, base = make_checkpoint(tmp_path, "llama", "bf16", 1)
    drafter, merged = make_drafter(tmp_path / "drafter", torch.float32), tmp_path / "merged"
    merged.mkdir()
    merge(base, drafter, merge_settings(1), merged)
    validate_checkpoint(merged)
    weight = load_file(drafter / "model.safetensors")["rnn_w.weight"]
    assert torch.equal(rank_tensors(merged)[0]["drafter.rnn_w.weight"], weight.to(torch.bfloat16))
