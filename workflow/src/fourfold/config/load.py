"""Reads a configuration and says in one line what is wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fourfold.config.root import Config
from fourfold.errors import FourfoldError


class ConfigError(FourfoldError):
    """The configuration is wrong: names the key, what was given and what is allowed."""


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
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as 'model' and 'engines', found {type(values).__name__}")
    return parse_config(values)


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
        text = f"{first['msg']} (given: {first['input']!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {text}{more}" if path else f"{text}{more}"
