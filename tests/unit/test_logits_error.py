"""Logits error: known divergences, and the stage on a tiny model and its quantised checkpoints."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chain import manifest, shared_chain
from transformers import AutoModelForCausalLM

from fourfold.artifacts import read_manifest
from fourfold.config.problems import Prompt
from fourfold.config.quantize import FidelitySettings, QuantizeSettings
from fourfold.config.stages import FidelityStage, QuantizeStage
from fourfold.errors import FourfoldError
from fourfold.fidelity.logits import CHUNK, compare, compare_states, summarize, text_row
from fourfold.fidelity.stage import compare_logits
from fourfold.model.tokenizer import encode_rendered, load_tokenizer, render_prompt
from fourfold.problems.read import read_problems
from fourfold.quantize.stage import quantize_model


def test_known_divergences() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    # Logits are logarithms of probabilities up to a shift, which a distribution does not show.
    error = compare(p.log() + 3, q.log())
    # 1/2 log 2 - 1/4 log 2.
    assert error.kl.tolist() == pytest.approx([0.25 * math.log(2), 0], abs=1e-7)
    assert error.top1.tolist() == [False, True]
    assert error.difference.tolist() == pytest.approx([3 + math.log(2), 3], abs=1e-6)


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 2 * CHUNK), scale=st.floats(0, 4))
def test_a_divergence_is_not_negative_and_chunks_do_not_change_it(seed: int, rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 7, generator=generator)
    b = a + scale * torch.randn(rows, 7, generator=generator)
    error, whole = compare_states(a, b, (lambda x: x, lambda x: x)), compare(a, b)
    assert (error.kl >= -1e-12).all()
    assert torch.equal(error.kl, whole.kl)
    assert torch.equal(error.top1, whole.top1)
    same = text_row(compare(a, a))
    assert (same["kl"], same["top1_agreement"], same["max_logit_difference"]) == (0, 1, 0)


def test_means_are_over_tokens_and_the_interval_over_texts() -> None:
    rows = [
        {"tokens": 30, "kl": 0.1, "kl_max": 0.5, "top1_agreement": 0.9, "max_logit_difference": 1.0},
        {"tokens": 10, "kl": 0.3, "kl_max": 0.4, "top1_agreement": 0.7, "max_logit_difference": 2.0},
    ]
    found = summarize(rows)
    assert (found["texts"], found["tokens"], found["kl_max"], found["max_logit_difference"]) == (2, 40, 0.5, 2.0)
    assert found["kl"] == pytest.approx(0.15)
    assert found["top1_agreement"] == pytest.approx(0.85)
    # Deviations 30 * -0.05 and 10 * 0.15; SE = sqrt(2 * (1.5^2 + 1.5^2)) / 40; t = 12.706 with one degree of freedom.
    assert found["kl_high"] - found["kl"] == pytest.approx(12.7062 * 3 / 40, rel=1e-5)
    assert found["kl_low"] == 0
    assert summarize(rows[:1])["kl_high"] == math.inf


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


SETTINGS = FidelityStage(fidelity=FidelitySettings(problems=3, max_tokens=20), prompt=Prompt())


def test_the_stage_measures_what_transformers_computes(chain: Path, tmp_path: Path) -> None:
    model, problems = manifest(chain, "model"), manifest(chain, "problems")
    quantized, output = tmp_path / "int8_wo" / "manifest.json", tmp_path / "fidelity" / "manifest.json"
    quantize_model(QuantizeStage(precision="int8_wo", quantize=QuantizeSettings()), model, None, quantized, "cpu")
    compare_logits(SETTINGS, model, quantized, problems, output, "cpu")
    with (output.parent / "texts.csv").open() as file:
        rows = list(csv.DictReader(file))
    held_out = read_problems(problems, "benchmark")
    assert [row["problem_id"] for row in rows] == [problem.id for problem in held_out]
    content = read_manifest(output)
    assert content["precision"] == "int8_wo"
    assert 0 < content["logits_error"]["kl"] < 0.05
    assert content["logits_error"]["tokens"] == sum(int(row["tokens"]) for row in rows)

    reference = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32).eval()
    for name, parameter in other.named_parameters():
        if "proj" in name:
            scale = parameter.detach().abs().amax(1, keepdim=True) / 127
            parameter.data = (parameter.detach() / scale).round() * scale
    tokenizer = load_tokenizer(model.parent)
    prompt = render_prompt(tokenizer, Prompt(), held_out[0].problem)
    solution = encode_rendered(tokenizer, held_out[0].solution)[:20]
    with torch.inference_mode():
        a, b = (net(torch.tensor([prompt + solution])).logits[0, len(prompt) - 1 : -1] for net in (reference, other))
    expected = text_row(compare(a, b))
    assert int(rows[0]["tokens"]) == expected["tokens"] == 20
    for name in ("kl", "kl_max", "max_logit_difference"):
        assert float(rows[0][name]) == pytest.approx(expected[name], rel=1e-2), name
    assert float(rows[0]["top1_agreement"]) == expected["top1_agreement"]


def test_bad_inputs_are_refused_at_once(chain: Path, tmp_path: Path) -> None:
    model, output = manifest(chain, "model"), tmp_path / "f" / "manifest.json"
    quantized = tmp_path / "int8_wo" / "manifest.json"
    quantize_model(QuantizeStage(precision="int8_wo", quantize=QuantizeSettings()), model, None, quantized, "cpu")
    settings = FidelityStage(fidelity=FidelitySettings(problems=4), prompt=Prompt())
    with pytest.raises(FourfoldError, match=r"fidelity\.problems is 4, but the benchmark split holds 3"):
        compare_logits(settings, model, quantized, manifest(chain, "problems"), output, "cpu")
    with pytest.raises(FourfoldError, match="made by fetch_model; give the manifest that quantize_model wrote"):
        compare_logits(settings, model, model, manifest(chain, "problems"), output, "cpu")
    assert not output.exists()
