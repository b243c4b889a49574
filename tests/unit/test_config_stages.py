"""Each stage is given the keys that it reads, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.config import Config, load_config, parse_config
from fourfold.config.stages import stage_settings

TINY = load_config(Path(__file__).parents[2] / "config" / "tiny.yaml")
STAGES = [
    ("fetch_model", None),
    ("fetch_problems", None),
    ("build_calibration", None),
    ("quantize_model", "fp8"),
    ("compare_logits", "fp8"),
    ("generate_drafter_data", None),
    ("train_drafter", None),
    ("evaluate_drafter", None),
    ("build_engine", "bf16"),
    ("build_engine", "fp8-redrafter"),
    ("convert_checkpoint", "fp8-tp2"),
    ("pack_engine", "bf16"),
    ("benchmark_engine", None),
    ("make_report", None),
]
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "name": ("other", set()),
    "model.seed": (1, {"fetch_model"}),
    "problems.splits.train": (25, {"fetch_problems"}),
    "prompt.system": (
        "Think.",
        {"build_calibration", "compare_logits fp8", "generate_drafter_data", "evaluate_drafter", "benchmark_engine"},
    ),
    "calibration.samples": (3, {"build_calibration"}),
    "quantize.batch_size": (1, {"quantize_model fp8"}),
    "fidelity.problems": (3, {"compare_logits fp8"}),
    "drafter.target": ("bf16", set()),
    "drafter.data.max_tokens": (25, {"generate_drafter_data"}),
    "drafter.shape.exit_dim": (64, {"train_drafter"}),
    "drafter.training.learning_rate": (0.5, {"train_drafter"}),
    "drafter.evaluation.max_tokens": (17, {"evaluate_drafter"}),
    "drafter.evaluation.temperatures": ([0.5], {"evaluate_drafter"}),
    "engines.fp8-redrafter.beam_length": (3, {"build_engine fp8-redrafter"}),
    "engines.bf16.max_num_seqs": (5, {"build_engine bf16", "pack_engine bf16"}),
    "tensorrt_llm.max_num_tokens": (64, {"pack_engine bf16"}),
    "benchmark.temperature": (0.5, {"benchmark_engine"}),
    "report.title": ("Other", {"make_report"}),
    "report.max_kl": (0.1, {"make_report"}),
}


def with_change(path: str, value: Any) -> Config:
    values = TINY.model_dump()
    *parents, last = path.split(".")
    section = values
    for key in parents:
        section = section[key]
    section[last] = value
    return parse_config(values)


def all_settings(config: Config) -> dict[str, str]:
    return {f"{stage} {part}" if part else stage: stage_settings(config, stage, part) for stage, part in STAGES}


@pytest.mark.parametrize("path", CHANGES)
def test_a_key_reaches_the_stages_that_read_it_alone(path: str) -> None:
    value, expected = CHANGES[path]
    before, after = all_settings(TINY), all_settings(with_change(path, value))
    assert {stage for stage in before if before[stage] != after[stage]} == expected


def test_every_section_is_covered_by_a_change() -> None:
    assert {path.split(".")[0] for path in CHANGES} == set(Config.model_fields)


@pytest.mark.parametrize(("stage", "part"), STAGES)
def test_settings_are_json(stage: str, part: str | None) -> None:
    assert isinstance(json.loads(stage_settings(TINY, stage, part)), dict)


def test_a_drafter_is_merged_in_tensorrt_llms_terms() -> None:
    recipe = load_config(Path(__file__).parents[2] / "config" / "openmath-14b.yaml")
    assert json.loads(stage_settings(recipe, "merge_drafter", "fp8-redrafter")) == {
        "tensor_parallel_size": 2,
        "redrafter_num_beams": 1,
        "redrafter_draft_len_per_beam": 3,
        "redrafter_greedy_search": True,
    }
    assert json.loads(stage_settings(recipe, "convert_checkpoint", "int8_wo-tp4")) == {
        "precision": "int8_wo",
        "tensor_parallel_size": 4,
    }


def test_an_unknown_stage_or_engine_is_an_error() -> None:
    with pytest.raises(KeyError):
        stage_settings(TINY, "bake")
    with pytest.raises(KeyError):
        stage_settings(TINY, "build_engine", "fp4")
