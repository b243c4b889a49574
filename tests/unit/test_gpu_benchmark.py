"""The carrier computes the small model's function, and so does its drafter; the GPU's benchmark runs on a CPU too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_chain import manifest, shared_chain
from tiny_models import save_reference, tiny_drafter, tiny_reference

from fourfold.benchmark.gpu import GpuBenchmark, benchmark_gpu
from fourfold.benchmark.rows import read_csv
from fourfold.errors import FourfoldError
from fourfold.model.carrier import QWEN2_14B, carry, carry_drafter
from fourfold.modeling.checkpoint import Weights, build_transformer, read_weights
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.transformer import Transformer
from fourfold.quantize.on_device import input_ranges, save_weights, to_fp8

CPU = torch.device("cpu")
LARGE = replace(
    QWEN2_14B,
    vocab_size=400,
    hidden_size=256,
    intermediate_size=224,
    num_hidden_layers=3,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=64,
)


def small_and_carrier(path: Path, architecture: str) -> tuple[Transformer, TransformerConfig, Weights]:
    save_reference(tiny_reference(architecture), path)
    config, weights = read_weights(path)
    carried = carry(config, weights, LARGE, CPU)
    return build_transformer(config, weights, CPU, torch.float32), *carried


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_carrier_computes_the_same_logits(architecture: str, tmp_path: Path) -> None:
    small, config, weights = small_and_carrier(tmp_path, architecture)
    carrier = build_transformer(config, weights, CPU, torch.float32)
    tokens = torch.randint(0, 320, (3, 60), generator=torch.Generator().manual_seed(1))
    expected = small.logits(small.hidden_states(tokens))
    got = carrier.logits(carrier.hidden_states(tokens))
    # Both scales, sqrt(64 / 256) and sqrt(64 / 16), are powers of two here: nothing is rounded again.
    torch.testing.assert_close(got[..., :320], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert got[..., 320:].max() < expected.min() - 100, "a token that the small model lacks could be chosen"


def test_a_carried_drafter_drafts_the_same(tmp_path: Path) -> None:
    small, config, _ = small_and_carrier(tmp_path, "llama")
    drafter = tiny_drafter(small, 1, draft_vocab=list(range(0, 320, 3)))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    large = carry_drafter(drafter, config)
    hidden, embedding = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    wide = torch.nn.functional.pad(torch.stack((hidden, embedding)), (0, 192))
    expected = drafter.logits(hidden, drafter.advance(embedding, embedding))
    got = large.logits(wide[0], large.advance(wide[1], wide[1]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_fp8_on_the_device_is_near_the_model(tmp_path: Path) -> None:
    save_reference(tiny_reference("qwen2"), tmp_path)
    config, weights = read_weights(tmp_path)
    plain = build_transformer(config, dict(weights), CPU, torch.float32)
    tokens = torch.randint(0, 320, (4, 50), generator=torch.Generator().manual_seed(1))
    ranges = input_ranges(plain, [tokens])
    assert len(ranges) == 4 * config.num_hidden_layers
    scaled = to_fp8(weights, ranges)
    assert scaled["layers.1.down.weight"].dtype == torch.float8_e4m3fn
    expected = plain.logits(plain.hidden_states(tokens))
    got = (fp8 := build_transformer(config, scaled, CPU, torch.float32)).logits(fp8.hidden_states(tokens))
    error = (got - expected).std() / expected.std()
    assert 0.01 < error < 0.2, "FP8 rounds, and no more than that"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_fp8_weights_are_read_as_they_were_saved(architecture: str, tmp_path: Path) -> None:
    save_reference(tiny_reference(architecture), tmp_path)
    config, weights = read_weights(tmp_path)
    ranges = input_ranges(build_transformer(config, dict(weights), CPU, torch.float32), [torch.arange(50)[None]])
    scaled = to_fp8(weights, ranges)
    save_weights(scaled, config, tmp_path)
    assert read_weights(tmp_path)[0] == config
    read = read_weights(tmp_path)[1]
    assert read.keys() == scaled.keys()
    for name, tensor in scaled.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_reference(tiny_reference("llama"), tmp_path)
    config, weights = read_weights(tmp_path)
    with pytest.raises(FourfoldError, match="2 layers, width 64, 4 / 2 heads x 16 does not fit into 1 layers"):
        carry(config, weights, replace(LARGE, num_hidden_layers=1), CPU)


def test_the_benchmark_writes_a_row_for_each_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "steps.csv"
    settings = GpuBenchmark(sequences=(1, 3), contexts=(20,), steps=2, draft_vocab_size=64)
    benchmark_gpu(settings, output, None, None, None, "cpu", LARGE)
    rows = read_csv(output)
    cases = [(row["engine"], row["shape"], row["sequences"], row["temperature"]) for row in rows]
    expected = []
    for precision in ("bf16", "fp8", "fp8-all"):
        drafted = f"{precision}-redrafter"
        trees = {1: "4x5:11", 3: "4x5:11"}
        for engine, shapes in ((precision, {}), (drafted, {1: "1x3", 3: "1x3"}), (drafted, trees)):
            if precision != "bf16" or not shapes:
                # With all in FP8, the middle number of sequences alone.
                few = [(3, 0), (3, 0.7)] if precision == "fp8-all" else [(1, 0), (3, 0), (3, 0.7)]
                expected += [(engine, shapes.get(case[0]), *case) for case in few]
    assert cases == expected
    assert all(row["step_ms"] > 0 and row["captured_ms"] is None and row["context"] == 20 for row in rows)
    assert "at 3" in capsys.readouterr().out


def write_config(folder: Path, **changes: Any) -> Path:
    """A small training, as a workflow configuration; a section that is None is left out."""
    values = {
        "name": "small",
        "model": {"source": "tiny"},
        "problems": {
            "source": "local",
            "path": "problems.jsonl",
            "splits": {"train": 24, "calibration": 2, "benchmark": 3, "unseen": 2},
        },
        "calibration": {"samples": 2},
        "fidelity": {"problems": 2},
        "drafter": {
            "data": {"problems": 12, "samples_per_problem": 2, "max_tokens": 12, "max_num_seqs": 4},
            "shape": {"num_draft_layers": 1, "draft_vocab_size": 64},
            "training": {"epochs": 2, "micro_batch_size": 4},
            "evaluation": {"problems": 2},
        },
        "engines": {"bf16": {"precision": "bf16", "max_model_len": 160}},
        "benchmark": {"problems": 2, "max_tokens": 24, "concurrency": [1]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (values | changes).items() if value is not None}))
    return path


@pytest.mark.parametrize("target", ["fp8", "bf16"])
def test_it_trains_its_drafter_by_a_configuration(
    target: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    chain, output = shared_chain(tmp_path_factory), tmp_path / "rows.csv"
    drafter = yaml.safe_load(write_config(tmp_path).read_text())["drafter"] | {"target": target}
    config = write_config(tmp_path, drafter=drafter)
    parts = ("drafter", "text") if target == "fp8" else ("drafter",)
    settings = GpuBenchmark(parts=parts, sequences=(2,), answers=2, max_tokens=6)
    model, problems = manifest(chain, "model"), manifest(chain, "problems")
    benchmark_gpu(settings, output, model, None, problems, "cpu", replace(LARGE, vocab_size=640), config)
    first, *others = read_csv(output)
    assert (first["part"], first["engine"], first["texts"]) == ("drafter", target, 24)
    assert 24 <= first["text_tokens"] <= 24 * 12
    assert first["training_steps"] == 2 * -(-(24 - first["heldout_texts"]) // 4)
    assert first["best_epoch"] in (1, 2)
    assert 1 <= first["heldout_simulated_acceptance_length"] <= 4
    assert min(first[name] for name in ("data_seconds", "training_seconds", "training_step_ms")) > 0
    drafted = [row for row in others if row["part"] == "text" and row["drafts"]]
    assert bool(drafted) == ("text" in parts)
    assert all(row["equal_answers"] == row["answers"] for row in drafted)
    assert "trained here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("drafter", "changes", "message"),
    [
        (True, {}, "--drafter is a trained one, --config trains one; give one of the two"),
        (False, None, "give --model, --problems and one of --drafter and --config together"),
        (False, {"drafter": None}, "config.yaml: there is no section drafter, which says how to train one"),
        (False, {"drafter": {"target": "int8_wo"}}, "drafter.target is int8_wo; bench-gpu measures fp8 and bf16"),
        (False, {"drafter": {"epochs": 2}}, "drafter.epochs: unknown key"),
        (False, {"calibration": {"samples": 3}}, "calibration.samples is 3, but problems.splits.calibration holds 2"),
    ],
)
def test_it_is_told_of_one_drafter(drafter: bool, changes: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    config = None if changes is None else write_config(tmp_path, **changes)
    given = tmp_path / "manifest.json"
    with pytest.raises(FourfoldError, match=message) as refused:
        benchmark_gpu(
            GpuBenchmark(), tmp_path / "rows.csv", given, given if drafter else None, given, "cpu", config=config
        )
    assert "\n" not in str(refused.value)


def test_a_training_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="--parts drafter trains one; give --model, --problems and --config"):
        benchmark_gpu(GpuBenchmark(parts=("drafter",)), tmp_path / "rows.csv", None, None, None, "cpu")


def test_a_training_needs_its_problems(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    chain = shared_chain(tmp_path_factory)
    splits = {"train": 24, "calibration": 5, "benchmark": 3, "unseen": 2}
    problems = {"source": "local", "path": "problems.jsonl", "splits": splits}
    config = write_config(tmp_path, problems=problems, calibration={"samples": 5})
    arguments = (manifest(chain, "model"), None, manifest(chain, "problems"), "cpu")
    with pytest.raises(FourfoldError, match=r"calibration\.samples is 5, but .* holds fewer calibration problems"):
        benchmark_gpu(GpuBenchmark(), tmp_path / "rows.csv", *arguments, config=config)
