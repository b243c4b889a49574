"""Configurations that must be refused, as data in bad_input/config.yaml."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.config import ConfigError, load_config, parse_config
from fourfold.config.load import check_files

CASES = yaml.safe_load((Path(__file__).parent / "bad_input" / "config.yaml").read_text(encoding="utf-8"))


def by_id(group: str) -> Any:
    return pytest.mark.parametrize("case", CASES[group], ids=[case["id"] for case in CASES[group]])


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in changes.items():
        inner = result.get(key)
        same_source = not isinstance(value, dict) or value.get("source") is None
        mergeable = isinstance(inner, dict) and isinstance(value, dict) and same_source
        result[key] = merged(inner, value) if mergeable else value
    return result


def test_the_base_is_valid() -> None:
    assert parse_config(CASES["base"]).name == "minimal"


@by_id("files")
def test_a_file_that_cannot_be_read_is_one_line(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(case["text"] if isinstance(case["text"], bytes) else case["text"].encode())
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert case["message"] in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@by_id("changes")
def test_a_wrong_value_is_one_line(case: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(merged(CASES["base"], case["with"]))
    assert case["message"] in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 250


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=message) as error:
            load_config(path)
        assert str(path) in str(error.value)


def test_each_of_several_files_is_checked(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("name: a\nengines: &all {a: {precision: bf16}}\nmore:\n  <<: *all\n  b: 1\n")
    bad.write_text("name: a\nname: b\n")
    check_files([good])
    with pytest.raises(ConfigError, match=r"bad\.yaml: key name is given twice"):
        check_files([good, bad])


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CASES["base"]), encoding="utf-8-sig")
    assert load_config(path) == parse_config(CASES["base"])
