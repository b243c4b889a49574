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
from fourfold.config.engine import Numerics
from fourfold.config.problems import Prompt
from fourfold.config.quantize import FidelitySettings, QuantizeSettings
from fourfold.config.stages import FidelityStage, QuantizeStage
from fourfold.drafter.samples import Text
from fourfold.errors import FourfoldError
from fourfold.fidelity.logits import CHUNK, compare, compare_states, summarize, text_row
from fourfold.fidelity.stage import compare_logits
from fourfold.fidelity.states import engine_states
from fourfold.model.tokenizer import encode_rendered, load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.kv_cache import KVCache
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


INT8 = Numerics(precision="int8_wo")
SETTINGS = FidelityStage(numerics=INT8, fidelity=FidelitySettings(problems=3, max_tokens=20), prompt=Prompt())


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
    assert content["numerics"] == "int8_wo"
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
    settings = FidelityStage(numerics=INT8, fidelity=FidelitySettings(problems=4), prompt=Prompt())
    with pytest.raises(FourfoldError, match=r"fidelity\.problems is 4, but the benchmark split holds 3"):
        compare_logits(settings, model, quantized, manifest(chain, "problems"), output, "cpu")
    with pytest.raises(FourfoldError, match="made by fetch_model; give the manifest that quantize_model wrote"):
        compare_logits(settings, model, model, manifest(chain, "problems"), output, "cpu")
    fp8 = SETTINGS.model_copy(update={"numerics": Numerics(precision="fp8")})
    with pytest.raises(FourfoldError, match=r"holds int8_wo, but numerics\.precision is fp8; give that checkpoint"):
        compare_logits(fp8, model, quantized, manifest(chain, "problems"), output, "cpu")
    assert not output.exists()


def test_a_rounded_output_matrix_is_measured(chain: Path, tmp_path: Path) -> None:
    model, problems = manifest(chain, "model"), manifest(chain, "problems")
    output = tmp_path / "fidelity" / "manifest.json"
    numerics = Numerics(precision="bf16", fp8_lm_head=True)
    compare_logits(SETTINGS.model_copy(update={"numerics": numerics}), model, model, problems, output, "cpu")
    with (output.parent / "texts.csv").open() as file:
        rows = list(csv.DictReader(file))
    reference = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(model.parent)
    problem = read_problems(problems, "benchmark")[0]
    prompt = render_prompt(tokenizer, Prompt(), problem.problem)
    solution = encode_rendered(tokenizer, problem.solution)[:20]
    head = reference.get_output_embeddings().weight.detach()
    scale = head.abs().amax(1, keepdim=True) / 448
    with torch.inference_mode():
        hidden = reference.base_model(torch.tensor([prompt + solution])).last_hidden_state[0, len(prompt) - 1 : -1]
        sizes = torch.exp2(torch.log2(hidden.abs().amax(-1, keepdim=True) / 448).ceil())
        rounded = (hidden / sizes).to(torch.float8_e4m3fn).float() * sizes
        other = rounded @ ((head / scale).to(torch.float8_e4m3fn).float() * scale).T
        expected = text_row(compare(hidden @ head.T, other))
    assert float(rows[0]["kl"]) == pytest.approx(expected["kl"], rel=0.02)
    assert float(rows[0]["max_logit_difference"]) == pytest.approx(expected["max_logit_difference"], rel=0.02)
    assert read_manifest(output)["logits_error"]["numerics"] == "bf16-lm_head"


def test_states_are_those_that_decoding_computes(chain: Path) -> None:
    """Token by token, with the keys and values that the cache kept."""
    target = load_transformer(manifest(chain, "model").parent, "cpu")
    text = Text("p", "p", tuple(range(5, 25)), tuple(range(30, 42)))
    known = (*text.prompt_token_ids, *text.token_ids)[:-1]
    states = {}
    for dtype in (None, torch.float8_e4m3fn):
        cache = KVCache.allocate(target.config, 1, len(known), target.device, dtype or target.dtype)
        decoded = [
            target.forward(torch.tensor([[token]]), torch.tensor([[place]]), cache, place + 1)[0]
            for place, token in enumerate(known)
        ]
        states[dtype] = engine_states(target, text, dtype)
        assert torch.equal(states[dtype], torch.cat(decoded)[len(text.prompt_token_ids) - 1 :])
    assert states[None].shape == (12, target.config.hidden_size)
    assert not torch.equal(*states.values()), "an FP8 cache rounds"
