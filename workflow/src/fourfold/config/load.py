"""Reads a configuration and says in one line what is wrong with it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fourfold.config.root import Config
from fourfold.errors import FourfoldError

MOST_SHOWN = 80
"""Characters of a wrong value that a message shows."""


class ConfigError(FourfoldError):
    """The configuration is wrong: names the key, what was given and what is allowed."""


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would keep the last and say nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                problem = f"key {key.value} is given twice; keep one of the two"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Checks plain values, as read from YAML.

    Raises ConfigError with the first problem: its key path, what was given, what is allowed.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which those of the command line have their YAML types.

    Snakemake merges `--config 'drafter={training: {epochs: 3}}'` into the values, but leaves each 3 a string.

    Args:
        values: the configuration, overrides merged in.
        overrides: what the command line gave.
    """
    merged = dict(values)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = with_overrides(merged[key], value)
        else:
            merged[key] = _typed(value)
    return merged


def _typed(value: Any) -> Any:
    """A value as YAML reads it, with strings for whatever is no plain number, truth value or null."""
    if isinstance(value, Mapping):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        typed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return typed if typed is None or isinstance(typed, bool | int | float) else value


def load_config(path: Path) -> Config:
    """Reads and checks a YAML file. Raises ConfigError."""
    return parse_config(read_values(path))


def read_values(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, each given once. Raises ConfigError naming the file and the line."""
    try:
        with path.open("rb") as file:
            values = yaml.load(file, _UniqueKeys)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML names the file a second time, with the place in it.
        text = " ".join(str(error).split()).replace(f' in "{path}"', "")
        raise ConfigError(f"{path}: {text}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as 'model' and 'engines', found {type(values).__name__}")
    return values


def check_files(paths: Iterable[Path]) -> None:
    """Reads the files that Snakemake has merged: it does not mind a key that is given twice. Raises ConfigError."""
    for path in paths:
        read_values(path)


def describe(error: ValidationError) -> str:
    """One line for the first of pydantic's problems, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    # A discriminated union puts the chosen tag, which is no key of the user's, second in the path, or first if the
    # union is all there is.
    tags, last = {"hub", "pypi", "local", "tiny"}, len(first["loc"]) - 1
    path = ".".join(str(part) for i, part in enumerate(first["loc"]) if not (part in tags and i < 2 and i < last))
    if first["type"] == "extra_forbidden":
        text = "unknown key"
    elif first["type"] == "missing":
        text = "missing"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        given = repr(first["input"])
        text = f"{first['msg']} (given: {given if len(given) <= MOST_SHOWN else given[:MOST_SHOWN] + '…'})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # A key, too, may hold a line's end.
    return " ".join((f"{path}: {text}{more}" if path else f"{text}{more}").split())
