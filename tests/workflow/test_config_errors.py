"""A wrong configuration ends a run with one line, before any job starts."""

import re

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmodel: {source: tiny}\nname: b\n", "key name is given twice; keep one of the two, line 3, column 1"),
        ("- name\n- model\n", "Config file must be given as JSON or YAML with keys at top level."),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(workspace: Workspace, text: str, message: str) -> None:
    path = workspace.path / "broken.yaml"
    path.write_text(text)
    run = workspace.snakemake("--workflow-profile", "local", "--configfile", path)
    assert run.returncode == 1
    assert run.output.splitlines()[-1].endswith(message)
    assert "Traceback" not in run.output
    assert not (workspace.path / "results").exists()


def test_files_that_contradict_each_other_are_named(workspace: Workspace) -> None:
    files = ("config/config.yaml", "config/tiny.yaml")
    run = workspace.snakemake("--workflow-profile", "local", "--configfile", *files)
    assert run.returncode == 1
    # Snakemake merges several files: the PyPI model's keys are still there beside the tiny one's.
    assert re.search(
        r"^configuration, merged from \S*config/config\.yaml and \S*config/tiny\.yaml: model\.\w+: unknown key \(and",
        run.output.splitlines()[-1],
    )


def test_results_that_are_a_file_stop_a_run_and_stay(workspace: Workspace) -> None:
    (workspace.path / "results").write_text("mine")
    run = workspace.tiny()
    assert run.returncode == 1
    assert run.output.splitlines()[-1].endswith(
        "results: a file is where a folder belongs; move it away or choose another place"
    )
    assert "Traceback" not in run.output
    assert (workspace.path / "results").read_text() == "mine"


def test_a_broken_problem_file_is_one_line_in_the_log_and_stops_the_run(workspace: Workspace) -> None:
    path = workspace.path / "config" / "tiny-problems.jsonl"
    path.write_text(path.read_text().replace('"answer"', '"anser"', 1))
    run = workspace.tiny("results/tiny/problems/manifest.json")
    assert run.returncode == 1
    message = "error: config/tiny-problems.jsonl, line 1: no answer; it has problem, solution, anser"
    assert message in run.output
    log = (workspace.path / "results" / "tiny" / "logs" / "fetch_problems.log").read_text()
    assert "Traceback" not in run.output + log
    assert log.splitlines()[-1].endswith(message)
    assert not (workspace.path / "results" / "tiny" / "problems").exists()


def test_a_configuration_that_is_no_yaml_is_refused(workspace: Workspace) -> None:
    path = workspace.path / "broken.yaml"
    path.write_text("name: [1\n")
    run = workspace.snakemake("-n", "--configfile", path)
    assert run.returncode == 1
    assert "not valid JSON or YAML" in run.output
