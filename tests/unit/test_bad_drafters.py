"""Drafters that do not fit the engine, or are broken: refused through the command line before an engine is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refused import check_refusal, fourfold, old_artifact
from safetensors.torch import load_file, save_file

from fourfold.artifacts import write_artifact
from fourfold.config.model import TinyModel
from fourfold.model.stage import fetch_model
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, save_redrafter

WEIGHTS, VOCABULARY = "model.safetensors", "draft_vocab.safetensors"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = tmp_path_factory.mktemp("target") / "model" / "manifest.json"
    fetch_model(TinyModel(source="tiny"), manifest)
    return manifest


def nothing(folder: Path) -> None:
    """Leaves the drafter as it is."""


def weights(name: str, value: torch.Tensor | None, file: str = WEIGHTS) -> Break:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file) | {name: value}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / file)

    return change


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def write_drafter(folder: Path, change: Break, **shape: Any) -> Path:
    """A drafter of the tiny model's shape with a draft vocabulary of 32, changed before its manifest is written."""
    config = RedrafterConfig(**{"vocab_size": 512, "hidden_size": 64, "exit_dim": 128, "draft_vocab_size": 32, **shape})
    size = config.draft_vocab_size
    drafter = Redrafter(config, None if size is None else torch.arange(size))
    manifest = folder / "drafter" / "manifest.json"
    with write_artifact(manifest, stage="train_drafter", settings={}) as staging:
        save_redrafter(drafter, staging.path, torch.bfloat16)
        staging.facts["predict_tokens"] = 3
    change(folder / "drafter")
    content = json.loads(manifest.read_text())
    for name, facts in content["files"].items():
        if (folder / "drafter" / name).exists():
            facts["bytes"] = (folder / "drafter" / name).stat().st_size
    manifest.write_text(json.dumps(content))
    return manifest


NAN = torch.full((64,), float("nan"))
CASES: dict[str, tuple[dict[str, Any], Break, int, str]] = {
    "another width": ({"hidden_size": 32}, nothing, 4, "the drafter's hidden_size is 32, the model's 64; train a draf"),
    "another vocabulary": ({"vocab_size": 320}, nothing, 4, "the drafter's vocab_size is 320, the model's 512; train"),
    "more drafts than trained": (
        {},
        nothing,
        5,
        "beam_length is 5, but .*drafter was trained for 3 drafts, hence at mo",
    ),
    "more beams than tokens": (
        {"draft_vocab_size": 8},
        nothing,
        4,
        "beam_width is 9, but .*drafter drafts among 8 tokens",
    ),
    "a token twice": (
        {},
        weights("draft_to_target", torch.zeros(32, dtype=torch.int64), VOCABULARY),
        4,
        r"draft_vocab\.safetensors: draft_to_target names a token twice",
    ),
    "a token that is none": (
        {},
        weights("draft_to_target", torch.arange(490, 522), VOCABULARY),
        4,
        "draft_to_target names tokens outside the vocabulary of 512",
    ),
    "too few tokens": (
        {},
        weights("draft_to_target", torch.arange(31), VOCABULARY),
        4,
        r"draft_to_target is torch\.int64 \[31\], torch\.int64 \[32\] expected",
    ),
    "tokens under another name": (
        {},
        lambda folder: save_file({"tokens": torch.arange(32)}, folder / VOCABULARY),
        4,
        r"draft_vocab\.safetensors: draft_to_target is missing",
    ),
    "no tokens": ({}, lambda folder: (folder / VOCABULARY).unlink(), 4, r"draft_vocab\.safetensors: is missing"),
    "a missing tensor": ({}, weights("rnn_u.bias", None), 4, r"tensor rnn_u\.bias is missing"),
    "an unknown tensor": ({}, weights("gate", torch.ones(1)), 4, "unknown tensor gate"),
    "another shape": ({}, weights("rnn_u.bias", torch.ones(9)), 4, r"rnn_u\.bias is \[9\], \[64\] expected"),
    "a NaN": ({}, weights("rnn_u.bias", NAN), 4, r"drafter: tensor rnn_u\.bias holds a NaN or an infinity"),
    "half of its weights": ({}, cut, 4, r"model\.safetensors: cannot be read"),
    "a config.json that is no JSON": ({}, text("config.json", "{"), 4, r"config\.json: Expecting property name"),
    "a config.json without a size": (
        {},
        text("config.json", '{"model_type": "recurrent_drafting_drafter"}'),
        4,
        r"config\.json: drafter vocab_size is missing",
    ),
}


@pytest.mark.parametrize(("shape", "change", "beam_length", "message"), CASES.values(), ids=CASES)
def test_a_drafter_that_does_not_fit_is_one_line(
    target: Path, tmp_path: Path, shape: dict[str, Any], change: Break, beam_length: int, message: str
) -> None:
    drafter = write_drafter(tmp_path, change, **shape)
    output = old_artifact(tmp_path / "engines" / "fast")
    check_refusal(tmp_path, message, *build(target, drafter, output, beam_length))


def test_a_model_is_no_drafter(target: Path, tmp_path: Path) -> None:
    output = old_artifact(tmp_path / "engines" / "fast")
    message = "made by fetch_model; give the manifest that train_drafter wrote"
    check_refusal(tmp_path, message, *build(target, target, output))


def test_the_unbroken_drafter_passes(target: Path, tmp_path: Path) -> None:
    output = tmp_path / "engines" / "fast" / "manifest.json"
    assert fourfold(*build(target, write_drafter(tmp_path, nothing), output))[0] == 0
    assert (output.parent / "drafter" / VOCABULARY).is_file()


def build(target: Path, drafter: Path, output: Path, beam_length: int = 4) -> tuple[object, ...]:
    row = {"precision": "bf16", "drafter": "redrafter", "beam_width": 9, "beam_length": beam_length}
    settings = json.dumps(row | {"max_model_len": 64})
    return ("build-engine", "--settings", settings, "--target", target, "--drafter", drafter, "--output", output)
