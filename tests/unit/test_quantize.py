"""Calibration and quantisation on a tiny model: scales, padding-free batches, layout, determinism, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import write_jsonl
from fourfold.calibration.stage import build_calibration, read_texts
from fourfold.config.model import TinyModel
from fourfold.config.problems import LocalProblems, Prompt, Splits
from fourfold.config.quantize import CalibrationSettings, QuantizeSettings
from fourfold.config.stages import CalibrationStage, QuantizeStage
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.model.tokenizer import encode_rendered, load_tokenizer
from fourfold.problems.read import read_problems
from fourfold.problems.stage import fetch_problems
from fourfold.quantize.int8 import quantize_rows
from fourfold.quantize.layout import linear_groups, linear_names
from fourfold.quantize.packing import packed_batches
from fourfold.quantize.stage import quantize_model
from fourfold.quantize.verify import verify_checkpoint

CPU = torch.device("cpu")
FP8 = QuantizeStage(precision="fp8", quantize=QuantizeSettings(max_length=64, batch_size=3))
INT8 = QuantizeStage(precision="int8_wo", quantize=QuantizeSettings())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Manifests of a tiny Qwen2 (with biases, untied), of its calibration texts, and of the problems."""
    root = tmp_path_factory.mktemp("inputs")
    model, problems, texts = (root / name / "manifest.json" for name in ("model", "problems", "calibration"))
    fetch_model(TinyModel(source="tiny", architecture="qwen2"), model)
    rows = [
        {"problem": f"What is {i} + {i}?", "solution": f"It is\n#### {2 * i}", "answer": str(2 * i)} for i in range(90)
    ]
    write_jsonl(root / "p.jsonl", rows)
    splits = Splits(train=9, calibration=5, benchmark=3)
    source = LocalProblems(source="local", path=str(root / "p.jsonl"), splits=splits)
    fetch_problems(source, problems)
    stage = CalibrationStage(calibration=CalibrationSettings(samples=5), prompt=Prompt(system="Be brief."))
    build_calibration(stage, model, problems, texts)
    return model, texts, problems


@pytest.fixture(scope="module")
def fp8(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fp8") / "fp8" / "manifest.json"
    quantize_model(FP8, inputs[0], inputs[1], output, "cpu")
    return output


def test_calibration_texts_are_whole_conversations(inputs: tuple[Path, Path, Path]) -> None:
    texts = read_texts(inputs[1])
    problems = read_problems(inputs[2], "calibration")
    assert len(texts) == len(problems) == 5
    for text, problem in zip(texts, problems, strict=True):
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert f"{problem.problem}<|im_end|>\n<|im_start|>assistant\n{problem.solution}<|im_end|>\n" in text


def test_too_few_calibration_problems_are_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stage = CalibrationStage(calibration=CalibrationSettings(samples=6), prompt=Prompt())
    with pytest.raises(FourfoldError, match=r"calibration\.samples is 6, but .* holds 5"):
        build_calibration(stage, inputs[0], inputs[2], tmp_path / "c" / "manifest.json")


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=9), st.integers(1, 4))
def test_packing_keeps_every_token_and_adds_none(texts: list[list[int]], batch_size: int) -> None:
    batches = list(packed_batches(texts, batch_size, CPU))
    assert [token for batch in batches for token in batch.input_ids[0].tolist()] == [t for text in texts for t in text]
    assert sum(batch.texts for batch in batches) == len(texts)
    for batch in batches:
        count = batch.input_ids.shape[1]
        assert batch.position_ids.shape == (1, count)
        assert (batch.attention_mask is None) == (batch.texts == 1)
        if batch.attention_mask is not None:
            assert batch.attention_mask.shape == (1, 1, count, count)
            # Each token sees as many tokens as its position says, itself included.
            assert (batch.attention_mask[0, 0].sum(1) == batch.position_ids[0] + 1).all()


def test_packed_texts_do_not_see_each_other(inputs: tuple[Path, Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs[0].parent, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(inputs[0].parent)
    tokens = [encode_rendered(tokenizer, text) for text in read_texts(inputs[1])]
    (batch,) = packed_batches(tokens, 5, CPU)
    with torch.inference_mode():
        packed = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask
        ).last_hidden_state[0]
        alone = torch.cat([model.model(torch.tensor([text])).last_hidden_state[0] for text in tokens])
    assert torch.allclose(packed, alone, atol=1e-4)


def test_fp8_scales_are_the_largest_values_seen(inputs: tuple[Path, Path, Path], fp8: Path) -> None:
    """Weight and activation ranges, computed here with plain hooks, text by text."""
    model = AutoModelForCausalLM.from_pretrained(inputs[0].parent, dtype=torch.float32).eval()
    seen: dict[str, float] = {}
    for name in linear_names(model.config):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: max(seen.get(name, 0.0), float(args[0].abs().max()))})
        )
    tokenizer = load_tokenizer(inputs[0].parent)
    with torch.inference_mode():
        for text in read_texts(inputs[1]):
            model.model(torch.tensor([encode_rendered(tokenizer, text)[:64]]))
    tensors = load_file(fp8.parent / "model.safetensors")
    for group in linear_groups(model.config):
        widest = max(float(model.get_submodule(name).weight.detach().abs().max()) for name in group)
        for name in group:
            assert float(tensors[f"{name}.input_scale"]) == pytest.approx(seen[name] / 448, rel=1e-4)
            assert float(tensors[f"{name}.weight_scale"]) == pytest.approx(widest / 448, rel=1e-6)
            stored = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
            weight = model.get_submodule(name).weight
            # E4M3 has three bits of mantissa: 1/16 at most, and below its normal numbers 2^-10 of the scale.
            bound = (weight.abs() / 16).clamp(min=float(tensors[f"{name}.weight_scale"]) * 2**-10) * 1.01
            assert ((stored - weight).abs() <= bound).all()


def test_fp8_checkpoint_is_complete(inputs: tuple[Path, Path, Path], fp8: Path) -> None:
    content = read_manifest(fp8)
    names = set(content["files"])
    assert {"config.json", "hf_quant_config.json", "tokenizer.json", "generation_config.json"} <= names
    assert content["quantised_layers"] == 14
    assert content["calibration_texts"] == 5
    assert list(content["tensor_bytes"]) == ["BF16", "F32", "F8_E4M3"]
    assert content["tensor_bytes"]["F8_E4M3"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (fp8.parent / name).read_bytes() == (inputs[0].parent / name).read_bytes()
    original, quantised = (load_file(path.parent / "model.safetensors") for path in (inputs[0], fp8))
    for name in original.keys() - {f"{linear}.weight" for linear in linear_names(_config(inputs[0]))}:
        assert torch.equal(original[name], quantised[name]), name


def _config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model.parent)


def test_fp8_is_the_same_every_time(inputs: tuple[Path, Path, Path], fp8: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "manifest.json"
    quantize_model(FP8, inputs[0], inputs[1], again, "cpu")
    first, second = (read_manifest(path)["files"] for path in (fp8, again))
    assert first == second


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_rows_are_within_half_a_step(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = 0
    quantised, scale = quantize_rows(weight)
    assert quantised.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (rows,)
    assert (scale > 0).all()
    assert quantised.abs().max() <= 127
    assert ((quantised.float() * scale[:, None] - weight.float()).abs() <= scale[:, None] * 0.5001).all()
    assert (quantised[1:].abs().amax(1) == 127).all()


def test_int8_checkpoint(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "int8" / "manifest.json"
    quantize_model(INT8, inputs[0], None, output, "cpu")
    content = read_manifest(output)
    assert list(content["tensor_bytes"]) == ["BF16", "F32", "I8"]
    quantization = json.loads((output.parent / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "W8A16"
    assert content["calibration_texts"] == 0


def test_int8_of_several_files_has_an_index(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(inputs[0].parent, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="80KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_bytes((inputs[0].parent / name).read_bytes())
    from fourfold.config.model import LocalModel

    manifest = tmp_path / "model" / "manifest.json"
    fetch_model(LocalModel(source="local", path=str(source)), manifest)
    whole, parts = (tmp_path / name / "manifest.json" for name in ("whole", "parts"))
    quantize_model(INT8, inputs[0], None, whole, "cpu")
    quantize_model(INT8, manifest, None, parts, "cpu")
    index = json.loads((parts.parent / "model.safetensors.index.json").read_text())
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        merged |= load_file(parts.parent / file)
    expected = load_file(whole.parent / "model.safetensors")
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def spoil(directory: Path, how: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    if how == "wide":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
    elif how == "scale":
        del tensors[f"{name}.input_scale"]
    elif how == "zero":
        tensors[f"{name}.weight_scale"] = torch.zeros(())
    elif how == "apart":
        tensors[f"{name}.weight_scale"] *= 2
    elif how == "extra":
        tensors["extra"] = torch.ones(1)
    else:
        description = directory / "hf_quant_config.json"
        description.write_text(description.read_text().replace('"FP8"', '"NVFP4"'))
        return
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wide", r"up_proj\.weight is BF16"),
        ("scale", r"up_proj\.input_scale is missing"),
        ("zero", "not a positive number"),
        ("apart", "do not share their weight_scale"),
        ("extra", "extra is not expected"),
        ("described", "hf_quant_config.json says NVFP4"),
    ],
)
def test_half_quantised_checkpoints_do_not_pass(fp8: Path, tmp_path: Path, how: str, message: str) -> None:
    directory = tmp_path / "spoilt"
    directory.mkdir()
    for file in fp8.parent.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    verify_checkpoint(directory, "fp8", "BF16")
    spoil(directory, how)
    with pytest.raises(FourfoldError, match=message):
        verify_checkpoint(directory, "fp8", "BF16")


@pytest.mark.parametrize(
    ("stage", "calibration", "device", "message"),
    [
        (FP8, False, "cpu", "--calibration"),
        (FP8, True, "tpu", "--device: 'tpu'"),
        (QuantizeStage(precision="bf16", quantize=QuantizeSettings()), False, "cpu", "nothing to quantise"),
    ],
)
def test_bad_requests_are_refused_at_once(
    inputs: tuple[Path, Path, Path], tmp_path: Path, stage: QuantizeStage, calibration: bool, device: str, message: str
) -> None:
    with pytest.raises(FourfoldError, match=message):
        quantize_model(stage, inputs[0], inputs[1] if calibration else None, tmp_path / "q" / "manifest.json", device)
    assert not (tmp_path / "q").exists()
