"""Writes what documents the configuration, from its models: the JSON schema and config/README.md.

    python -m fourfold.config.document [--check]

`--check` writes nothing; it prints the difference and exits with 1 when a document is out of step.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from fourfold.artifacts.files import write_text
from fourfold.config.root import Config

CHECKOUT = Path(__file__).resolve().parents[4]
SCHEMA = "workflow/schemas/config.schema.json"
README = "config/README.md"
INTRODUCTION = """\
# Configuration

`config.yaml` is the default. `snakemake --configfile FILE` replaces it by another file; `snakemake --config KEY=VALUE`
changes single keys on top of either. A configuration says what is computed; where it runs, with how many processors
and how much memory, is the profile's business (`profiles/`).

Keys are checked before any job starts: a key that is unknown or given twice, a wrong type or an impossible combination
ends the run with one line that names the key. Editors complete and check them with
[`workflow/schemas/config.schema.json`](../workflow/schemas/config.schema.json), which a file names in its first line:

```yaml
# yaml-language-server: $schema=../workflow/schemas/config.schema.json
```

A key without a default must be given. This page is generated from the configuration's models (`make docs`).
"""


class _Schema(GenerateJsonSchema):
    """JSON schema in the dialect that editors know, with its title."""

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> dict[str, Any]:
        """The schema of the whole configuration."""
        return {"$schema": self.schema_dialect, **super().generate(schema, mode=mode)}


def schema_text() -> str:
    """The JSON schema of the configuration."""
    return json.dumps(Config.model_json_schema(schema_generator=_Schema), indent=2, ensure_ascii=False) + "\n"


def readme_text() -> str:
    """config/README.md: a table of every key of every section."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    parts = [INTRODUCTION, "## Top level\n", _table(schema, "", definitions)]
    for key, value in schema["properties"].items():
        parts += _section(key, value, definitions)
    return "\n".join(parts)


def _section(path: str, value: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Heading, description and table of a section, then those of the sections inside it."""
    parts: list[str] = []
    for variant in _variants(value, definitions):
        if "properties" not in variant:
            continue
        source = variant["properties"].get("source", {}).get("const")
        title = f"`{path}` with `source: {source}`" if source else f"`{path}`"
        parts += [f"## {title}\n", variant["description"] + "\n", _table(variant, path, definitions)]
        for key, inner in variant["properties"].items():
            # Splits are the same for every source of problems: once is enough.
            if key != "splits":
                parts += _section(f"{path}.{key}", inner, definitions)
    if path == "problems":
        parts += _section("problems.splits", {"$ref": "#/$defs/Splits"}, definitions)
    for entries in value.get("patternProperties", {}).values():
        parts += _section(f"{path}.NAME", entries, definitions)
    return parts


def _variants(value: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that a value may be."""
    options = value.get("oneOf") or value.get("anyOf") or [value]
    return [_resolve(option, definitions) for option in options]


def _resolve(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return definitions[value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _table(section: dict[str, Any], path: str, definitions: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        name = f"{path}.{key}" if path else key
        meaning = value.get("description") or " / ".join(
            v.get("description", "") for v in _variants(value, definitions)
        )
        cells = (f"`{name}`", _type(value, definitions), _default(key, value, section, definitions), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A value's type in words: `integer ≥ 1`, `string or null`, `section`."""
    if "oneOf" in value or "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in value.get("oneOf") or value["anyOf"]))
    value = _resolve(value, definitions)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if value["type"] == "array":
        return f"list of {_type(value['items'], definitions)}"
    if value["type"] == "object":
        return "section" if "properties" in value else "sections by name"
    bounds = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
        "multipleOf": "multiple of",
    }
    limits = [f"{sign} {value[bound]:.12g}" for bound, sign in bounds.items() if bound in value]
    if "pattern" in value:
        limits.append(f"matching `{value['pattern']}`")
    return " ".join([value["type"], ", ".join(limits)]).strip()


def _default(key: str, value: dict[str, Any], section: dict[str, Any], definitions: dict[str, Any]) -> str:
    if key in section.get("required", []):
        return "required"
    default = value.get("default")
    # A section's own keys state their defaults.
    return "" if isinstance(default, dict) else f"`{json.dumps(default, ensure_ascii=False)}`"


def main(arguments: list[str]) -> int:
    """Writes the documents, or checks them."""
    stale = False
    for name, text in ((SCHEMA, schema_text()), (README, readme_text())):
        path = CHECKOUT / name
        if "--check" not in arguments:
            write_text(path, text)
            continue
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        difference = difflib.unified_diff(found.splitlines(True), text.splitlines(True), name, f"{name} (models)")
        sys.stdout.writelines(difference)
        stale = stale or found != text
    if stale:
        print("out of step with the configuration's models; run: make docs", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
