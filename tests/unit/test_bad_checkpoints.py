"""Checkpoints that must be refused, through the command line: when the model is fetched, or an engine is built."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from refused import check_refusal, old_artifact
from safetensors.torch import load_file, save_file

from fourfold.artifacts import read_manifest
from fourfold.artifacts.tensors import first_not_finite
from fourfold.config.model import TinyModel
from fourfold.errors import FourfoldError
from fourfold.model.gguf import GgufFile
from fourfold.model.gguf_convert import convert_gguf
from fourfold.model.stage import fetch_model

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = tmp_path_factory.mktemp("tiny") / "model" / "manifest.json"
    fetch_model(TinyModel(source="tiny"), manifest)
    return manifest.parent


def config(**changes: Any) -> Break:
    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | changes
        kept = {key: value for key, value in values.items() if value != "absent"}
        (folder / CONFIG).write_text(json.dumps(kept))

    return change


def tensors(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """Changes the final norm (`norm`) or a projection (`down`)."""
    names = {"norm": "model.norm.weight", "down": "model.layers.1.mlp.down_proj.weight"}

    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        for short, edit in changes.items():
            weights[names[short]] = edit(weights[names[short]])
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return put


def file(name: str, content: bytes | None) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return change


def cut(name: str, keep: float, beside: int = 0) -> Break:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep) - beside])

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def index(*shards: str) -> Break:
    return file(INDEX, json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}).encode())


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[Break, str]] = {
    "half of the weights": (
        cut(WEIGHTS, 0.5),
        "model.safetensors is cut or broken: it holds .* bytes of tensors, .* expec",
    ),
    "all weights but a byte": (cut(WEIGHTS, 1, 1), "cut or broken: it holds"),
    "no weights in the file": (file(WEIGHTS, b""), "cut or broken: its 0 bytes do not hold a header"),
    "a header without end": (file(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "cut or broken: its 10 bytes"),
    "a header that is no JSON": (file(WEIGHTS, struct.pack("<Q", 2) + b"{,"), "its header is not safetensors'"),
    "a pickle by another name": (file(WEIGHTS, b"\x80\x02}q\x00." * 9), "model.safetensors is cut or broken"),
    "a pickle alone": (pickled, r"holds no \*\.safetensors; .*\(pickles such as pytorch_model\.bin are not read"),
    "a shard that is not there": (
        index(WEIGHTS, "model-2.safetensors"),
        "model-2.safetensors is missing .of 1., which mo",
    ),
    "an index that is none": (file(INDEX, b"[]"), "model.safetensors.index.json is no index of weights"),
    "integers": (
        tensors(down=lambda x: x.to(torch.int8)),
        r"model\.layers\.1\.mlp\.down_proj\.weight is I8, one of BF16",
    ),
    "doubles": (tensors(norm=lambda x: x.double()), r"model\.norm\.weight is F64, one of BF16, F16, F32 is expected"),
    "float8": (tensors(down=lambda x: x.to(torch.float8_e4m3fn)), "is F8_E4M3, .* before its quantisation"),
    "a NaN": (
        tensors(down=one(float("nan"))),
        r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds a NaN or an infin",
    ),
    "an infinity": (tensors(norm=one(float("-inf"))), r"tensor model\.norm\.weight holds a NaN or an infinity"),
    "another shape": (tensors(norm=lambda x: x[:3].clone()), r"tensor model\.norm\.weight has shape \[3\]"),
    "a width that is not the tensors'": (config(hidden_size=128), r"has shape .*, config\.json means"),
    "more layers than there are": (config(num_hidden_layers=3), r"model\.layers\.2\S+ is missing"),
    "a smaller vocabulary": (
        config(vocab_size=256),
        "the tokenizer has 512 tokens, but config.json means 256; take both",
    ),
    "a larger vocabulary": (
        config(vocab_size=1024),
        r"embed_tokens\.weight has shape \[512, 64\], config\.json means \[1024",
    ),
    "an unknown architecture": (
        config(architectures=["MistralForCausalLM"]),
        "architecture MistralForCausalLM is not sup",
    ),
    "an architecture in no list": (config(architectures={"a": 1}), "architecture none is not supported"),
    "an unknown RoPE": (
        config(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "rope type yarn is not supported",
    ),
    "RoPE without its numbers": (config(rope_parameters=ROPE), "original_max_position_embeddings is None, a positive"),
    "a negative RoPE base": (config(rope_parameters={"rope_type": "default", "rope_theta": -1}), "rope_theta is -1"),
    "another activation": (config(hidden_act="gelu"), "hidden_act gelu is not supported, only silu"),
    "heads without a common measure": (config(num_key_value_heads=3), "4 num_attention_heads are no multiple of 3"),
    "heads that do not divide the width": (
        config(num_attention_heads=5, num_key_value_heads=5, head_dim="absent"),
        "hidden_size 64 and 5 num_attention_heads make no heads of an even width",
    ),
    "heads of odd width": (config(head_dim=15), "make no heads of an even width"),
    "a width in words": (config(hidden_size="64"), "hidden_size is '64', a positive whole number is expected"),
    "no width": (config(hidden_size="absent"), "hidden_size is None, a positive whole number is expected"),
    "an endless epsilon": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf, a positive number is expected"),
    "no config.json": (file(CONFIG, None), r"holds no config\.json; save the model with save_pretrained"),
    "a config.json that is no JSON": (file(CONFIG, b"{"), "config.json: Expecting property name"),
    "a config.json that is a list": (file(CONFIG, b"[]"), "config.json: the file is a list, an object"),
    "a config.json that is not UTF-8": (file(CONFIG, b'{"\xff"}'), "config.json: 'utf-8' codec can't decode"),
    "no tokenizer": (file("tokenizer.json", None), "source: no tokenizer can be loaded"),
    "a tokenizer that is no JSON": (file("tokenizer.json", b"{"), "source: no tokenizer can be loaded"),
    "a tokenizer that is cut": (cut("tokenizer.json", 0.5), "source: no tokenizer can be loaded"),
    "no chat template": (
        file("chat_template.jinja", None),
        "source: the tokenizer has no chat template; choose an ins",
    ),
    "a chat template that is cut": (cut("chat_template.jinja", 0.5), "prompt: the model's chat template refuses it"),
    "end tokens that are no JSON": (file("generation_config.json", b"{"), "generation_config.json: not a JSON object"),
    "end tokens in words": (
        file("generation_config.json", b'{"eos_token_id": "</s>"}'),
        "eos_token_id is '</s>'; a tok",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_a_broken_model_is_one_line(tiny: Path, tmp_path: Path, change: Break, message: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("manifest.json"))
    change(source)
    output = old_artifact(tmp_path / "results" / "model")
    settings = json.dumps({"source": "local", "path": str(source)})
    check_refusal(tmp_path, message, "fetch-model", "--settings", settings, "--output", output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensors(down=one(float("nan"))), r"model: tensor layers\.1\.down\.weight holds a NaN or an infinity; make"),
        (tensors(norm=one(float("inf"))), r"model: tensor norm holds a NaN or an infinity; make the checkpoint again"),
        (cut(WEIGHTS, 0.5), r"model\.safetensors: has \d+ bytes, \d+ expected; delete .* and run again"),
        (file("tokenizer.json", None), r"tokenizer\.json: is missing, \d+ expected; delete .* and run again"),
        (file("manifest.json", b"{"), r"manifest\.json: cannot be read .*; delete its folder and run again"),
        (file("manifest.json", b"{}"), r"manifest\.json: is no manifest; delete its folder and run again"),
    ],
)
def test_an_engine_is_not_built_from_a_broken_model(tiny: Path, tmp_path: Path, change: Break, message: str) -> None:
    target = tmp_path / "model"
    shutil.copytree(tiny, target)
    change(target)
    output = old_artifact(tmp_path / "engines" / "a")
    given = json.dumps({"precision": "bf16", "max_model_len": 64})
    arguments = ("build-engine", "--settings", given, "--target", target / "manifest.json", "--output", output)
    check_refusal(tmp_path, message, *arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"precision": "fp8"}, "the checkpoint holds bf16 weights, fp8 expected"),
        (
            {"precision": "bf16", "backend": "tensorrt_llm"},
            "backend tensorrt_llm is built by compile_engine and pack_engine; use backend torch",
        ),
        (
            {"precision": "bf16", "max_model_len": 4096},
            "max_model_len is 4096, more than the 2048 positions .*; lower it",
        ),
        ({"precision": "bf16", "drafter": "redrafter"}, "names a drafter: give its manifest with --drafter"),
        ({"precision": "bf16", "slots": 2}, "--settings: slots: unknown key"),
    ],
)
def test_an_engine_s_row_must_fit_the_model(tiny: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    output = old_artifact(tmp_path / "engines" / "a")
    arguments = ("build-engine", "--settings", json.dumps(row), "--target", tiny / "manifest.json", "--output", output)
    check_refusal(tmp_path, message, *arguments)


def test_values_that_are_no_numbers_are_found_in_every_dtype() -> None:
    weight = torch.linspace(-448, 448, 64).view(8, 8).to(torch.float8_e4m3fn)
    whole = [("a", weight), ("b", torch.ones(2, dtype=torch.int8)), ("c", torch.empty(0)), ("d", torch.ones(3).half())]
    assert first_not_finite(whole) is None
    for code in (0x7F, 0xFF):
        broken = weight.clone()
        broken.view(torch.uint8)[2, 2] = code
        assert broken.float().isnan().any()
        assert first_not_finite([*whole, ("e", broken)]) == "e"
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for value in (float("nan"), float("inf"), float("-inf")):
            assert first_not_finite([*whole, ("e", torch.tensor([1.0, value, 2.0], dtype=dtype))]) == "e"


def gguf(path: Path, kind: GGMLQuantizationType | None = None, **entries: Any) -> Path:
    """A GGUF file of a few entries and, with `kind`, one tensor of 256 values of that quantisation."""
    writer = GGUFWriter(path, "llama")
    for key, value in entries.items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(key.replace("__", "."), value)
    if kind is not None:
        sizes = {GGMLQuantizationType.Q8_K: 292, GGMLQuantizationType.Q8_1: 288}
        writer.add_tensor("token_embd.weight", np.zeros((1, sizes[kind]), np.uint8), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def test_gguf_files_of_an_unsupported_quantisation_are_one_line(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", GGMLQuantizationType.Q8_K)
    with pytest.raises(
        FourfoldError, match=r"m\.gguf: tensor token_embd\.weight is quantised as Q8_K, which cannot be"
    ):
        GgufFile(path).tensor("token_embd.weight")
    content = path.read_bytes()
    kind = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    path.write_bytes(content[:kind] + struct.pack("<I", 999) + content[kind + 4 :])
    with pytest.raises(
        FourfoldError, match=r"tensor token_embd\.weight is of an unknown quantisation \(999\); choose a fi"
    ):
        GgufFile(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "tokenizer.ggml.model is None: only byte-level BPE"),
        ({"tokenizer__ggml__model": "gpt2"}, "m.gguf: its metadata do not make a model"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__tokens": ["a"]}, "its metadata do not make a model"),
    ],
)
def test_gguf_files_without_their_entries_are_one_line(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=message) as error:
        convert_gguf(gguf(tmp_path / "m.gguf", **entries), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / WEIGHTS).exists()


def test_an_empty_gguf_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(FourfoldError, match=r"^m\.gguf: not a whole GGUF file"):
        GgufFile(tmp_path / "m.gguf")


def test_the_unbroken_model_passes(tiny: Path) -> None:
    assert read_manifest(tiny / "manifest.json")["stage"] == "fetch_model"
