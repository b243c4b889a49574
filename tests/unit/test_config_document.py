"""The generated documents are in step with the configuration's models."""

import difflib
import json
from pathlib import Path

import pytest
import yaml

from fourfold.config import document

jsonschema = pytest.importorskip("jsonschema")


@pytest.mark.parametrize(
    ("name", "text"), [(document.SCHEMA, document.schema_text()), (document.README, document.readme_text())]
)
def test_documents_are_in_step(name: str, text: str) -> None:
    found = (document.CHECKOUT / name).read_text(encoding="utf-8")
    difference = "".join(difflib.unified_diff(found.splitlines(True), text.splitlines(True), name, "models"))
    assert not difference, f"run `make docs`:\n{difference}"


def test_every_key_is_documented() -> None:
    """Every key has a row in the reference, and every row a meaning."""
    rows = [line.split(" | ") for line in document.readme_text().splitlines() if line.startswith("| `")]
    keys = {row[0].strip("| `") for row in rows}
    assert {"name", "drafter.training.learning_rate", "engines.NAME.beam_length", "problems.splits.train"} <= keys
    undocumented = [row[0] for row in rows if not row[-1].strip(" |") and ".source" not in row[0]]
    assert undocumented == []


@pytest.mark.parametrize("path", sorted((document.CHECKOUT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_schema_accepts_the_configurations(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = json.loads(document.schema_text())
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "nme": 1}, schema)
