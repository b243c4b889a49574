"""The configuration: what is refused, and with which words."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fourfold.config import Config, ConfigError, load_config, parse_config
from fourfold.config.load import with_overrides
from fourfold.config.sources import source_files

CONFIGS = Path(__file__).parents[2] / "config"
MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "model": {"source": "tiny"},
    "problems": {"source": "local", "path": "p.jsonl", "splits": {"train": 256, "calibration": 64, "benchmark": 32}},
    "engines": {"bf16": {"precision": "bf16"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section = values
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return values


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_the_repository_are_valid(path: Path) -> None:
    assert load_config(path).engines


def test_defaults_fill_what_is_not_given() -> None:
    config = parse_config(MINIMAL)
    assert config.drafter.training.predict_tokens == 3
    assert config.engines["bf16"].drafter == "none"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("benchmark.problms", 2, "benchmark.problms: unknown key"),
        ("drafter.training.epoch", 2, "drafter.training.epoch: unknown key"),
        ("model.sourc", "tiny", "model.sourc: unknown key"),
        ("problems.splits.test", 2, "problems.splits.test: unknown key"),
        ("benchmark.max_tokens", "many", "benchmark.max_tokens: Input should be a valid integer (given: 'many')"),
        ("benchmark.max_tokens", 1.5, "benchmark.max_tokens: Input should be a valid integer"),
        ("benchmark.max_tokens", True, "benchmark.max_tokens: Input should be a valid integer (given: True)"),
        ("benchmark.same_problem", "yes", "benchmark.same_problem: Input should be a valid boolean (given: 'yes')"),
        ("benchmark.max_tokens", 0, "benchmark.max_tokens: Input should be greater than or equal to 1 (given: 0)"),
        ("engines.bf16.precision", "fp16", "engines.bf16.precision: Input should be 'bf16', 'fp8' or 'int8_wo'"),
        ("engines", {}, "engines: "),
        ("name", "Two Words", "name: "),
        ("model.source", "disk", "model: Input tag 'disk'"),
        ("calibration.samples", 65, "calibration.samples is 65, but problems.splits.calibration holds 64"),
        ("fidelity.problems", 33, "fidelity.problems is 33, but problems.splits.benchmark holds 32"),
        ("fidelity.problems", 1, "fidelity.problems: Input should be greater than or equal to 2 (given: 1)"),
        ("benchmark.problems", 33, "benchmark.problems is 33, but problems.splits.benchmark holds 32"),
        ("benchmark.keep_first", 2, "keep_first is 2, more than the 1 generations"),
        ("benchmark.concurrency", [], "concurrency must name at least one value"),
        ("engines.bf16.tensor_parallel_size", 2, "engines.bf16.tensor_parallel_size needs backend tensorrt_llm"),
        ("prompt.user", "Solve it.", "prompt.user: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(changed(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^engines: missing$"):
        parse_config({key: value for key, value in MINIMAL.items() if key != "engines"})


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        parse_config({**MINIMAL, "nme": 1, "reprt": 2})


def test_an_engine_cannot_draft_more_than_was_trained() -> None:
    values = changed("engines.fast", {"precision": "fp8", "drafter": "redrafter", "beam_length": 5})
    with pytest.raises(ConfigError, match=r"engines\.fast\.beam_length is 5, .* trains for at most 4"):
        parse_config(values)
    values["drafter"] = {"training": {"predict_tokens": 4}}
    assert parse_config(values).engines["fast"].beam_length == 5


def test_a_draft_length_does_not_matter_without_a_drafter() -> None:
    assert parse_config(changed("engines.bf16.beam_length", 9)).engines["bf16"].beam_length == 9


def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [1\nmodel: }")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "words"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected keys"):
        load_config(path)


@given(st.text(min_size=1, max_size=12))
def test_no_unknown_key_passes(key: str) -> None:
    if key in Config.model_fields:
        return
    with pytest.raises(ConfigError):
        parse_config({**MINIMAL, key: 1})


@given(
    epochs=st.integers(1, 9),
    rate=st.floats(1e-6, 1, allow_nan=False),
    rnn=st.booleans(),
    concurrency=st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True),
)
def test_overrides_get_the_types_that_yaml_gives_them(
    epochs: int, rate: float, rnn: bool, concurrency: list[int]
) -> None:
    """Snakemake leaves every value inside a mapping of `--config` a string."""
    overrides = {
        "drafter": {
            "training": {"epochs": str(epochs), "learning_rate": f"{rate:.9f}"},
            "shape": {"rnn": str(rnn).lower(), "exit_dim": "null"},
        },
        "benchmark": {"concurrency": [str(value) for value in concurrency]},
    }
    merged = copy.deepcopy(MINIMAL) | overrides
    config = parse_config(with_overrides(merged, overrides))
    assert config.drafter.training.epochs == epochs
    assert config.drafter.training.learning_rate == pytest.approx(rate, abs=1e-9)
    assert config.drafter.shape.rnn is rnn
    assert config.drafter.shape.exit_dim is None
    assert config.benchmark.concurrency == concurrency


def test_overrides_leave_the_rest_as_it_is() -> None:
    values = {"a": {"text": "7", "number": 7}, "b": "1.5"}
    assert with_overrides(values, {"a": {"number": "8"}}) == {"a": {"text": "7", "number": 8}, "b": "1.5"}
    assert with_overrides({"user": "{problem}"}, {"user": "{problem}"}) == {"user": "{problem}"}


def test_local_sources_are_found_before_anything_runs(tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    config = parse_config(changed("problems.path", str(problems)))
    with pytest.raises(ConfigError, match=r"^problems\.path: no file"):
        source_files(config.problems)
    problems.write_text("{}\n")
    assert source_files(config.problems) == [str(problems)]
    assert source_files(config.model) == []


def test_a_local_model_consists_of_its_visible_files(tmp_path: Path) -> None:
    config = parse_config(MINIMAL | {"model": {"source": "local", "path": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"^model\.path: no checkpoint in"):
        source_files(config.model)
    for name in ("model.safetensors", "config.json", ".DS_Store"):
        (tmp_path / name).touch()
    assert [Path(file).name for file in source_files(config.model)] == ["config.json", "model.safetensors"]


def test_a_configuration_survives_being_written() -> None:
    config = load_config(CONFIGS / "tiny.yaml")
    assert parse_config(yaml.safe_load(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("row", "drafter", "message"),
    [
        ({"beam_width": "auto"}, {}, r"engines\.fast: auto needs backend torch"),
        ({"kv_cache_dtype": "fp8"}, {}, r"engines\.fast\.kv_cache_dtype needs backend torch; leave it out"),
        ({"fp8_lm_head": True}, {}, r"engines\.fast\.fp8_lm_head needs backend torch; leave it out"),
        ({"draft_min_p": 0.1}, {}, r"engines\.fast\.draft_min_p needs backend torch; leave it out"),
        ({"draft_tokens": 4}, {}, r"engines\.fast\.draft_tokens needs backend torch; leave it out"),
        (
            {},
            {"shape": {"draft_vocab_size": 64}},
            r"drafter\.shape\.draft_vocab_size needs backend torch, .* set it to nu",
        ),
        (
            {},
            {"shape": {"exit_dim": 64}},
            r"drafter\.shape\.exit_dim is 64, .* takes no input projection; set it to null",
        ),
    ],
)
def test_what_tensorrt_llm_cannot_draft_is_refused(row: dict[str, Any], drafter: dict[str, Any], message: str) -> None:
    fast = {"precision": "fp8", "drafter": "redrafter", "backend": "tensorrt_llm"}
    values = changed("engines.fast", fast) | {"drafter": drafter}
    values["engines"]["fast"] = fast | row
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_splits_must_hold_what_a_drafter_needs_where_an_engine_drafts() -> None:
    values = changed("drafter.data.problems", 257)
    assert parse_config(values).drafter.data.problems == 257
    values["engines"]["fp8"] = {"precision": "fp8", "drafter": "redrafter"}
    with pytest.raises(ConfigError, match=r"drafter\.data\.problems is 257, but problems\.splits\.train holds 256"):
        parse_config(values)
