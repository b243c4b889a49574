"""A wrong configuration ends a run with one line, before any job starts."""

import pytest
from conftest import Workspace


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark={problms: 2}", "benchmark.problms: unknown key"),
        ("nme=other", "nme: unknown key"),
        ("benchmark={max_tokens: many}", "benchmark.max_tokens: Input should be a valid integer (given: 'many')"),
        ("name=7", "name: Input should be a valid string (given: 7)"),
        (
            "engines={fp8-redrafter: {beam_length: 9}}",
            "engines.fp8-redrafter.beam_length is 9, but drafter.training.predict_tokens trains for at most 4",
        ),
        ("calibration={samples: 99}", "calibration.samples is 99, but problems.splits.calibration holds 4"),
        ("problems={path: nowhere.jsonl}", "problems.path: no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line(workspace: Workspace, override: str, message: str) -> None:
    run = workspace.tiny(config=(override,))
    assert run.returncode == 1
    lines = run.output.splitlines()
    assert [line for line in lines if line.startswith("configuration: ")] == [f"configuration: {message}"]
    assert lines[-1] == f"configuration: {message}"
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()


def test_a_configuration_that_is_no_yaml_is_refused(workspace: Workspace) -> None:
    path = workspace.path / "broken.yaml"
    path.write_text("name: [1\n")
    run = workspace.snakemake("-n", "--configfile", path)
    assert run.returncode == 1
    assert "not valid JSON or YAML" in run.output
