"""The command line: what a user sees of an error."""

import json
import subprocess
import sys
from pathlib import Path

FOURFOLD = str(Path(sys.executable).with_name("fourfold"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FOURFOLD, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    settings = json.dumps({"source": "tiny", "hidden": 64})
    log = tmp_path / "stage.log"
    done = run("--log", log, "fetch-model", "--settings", settings, "--output", tmp_path / "m" / "manifest.json")
    assert done.returncode == 1
    assert done.stderr == "error: --settings: hidden: unknown key\n"
    assert log.read_text().endswith("ERROR error: --settings: hidden: unknown key\n")
    assert not (tmp_path / "m").exists()


def test_settings_that_are_no_json_are_one_line(tmp_path: Path) -> None:
    done = run("fetch-model", "--settings", "{", "--output", tmp_path / "m" / "manifest.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --settings: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_input_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    output = tmp_path / "e" / "manifest.json"
    done = run("build-engine", "--settings", "{}", "--target", tmp_path / "none.json", "--output", output)
    assert done.returncode == 2
    assert "none.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_stage_is_a_command() -> None:
    help_text = run("--help").stdout
    for command in ("fetch-model", "fetch-problems", "build-calibration", "quantize-model", "generate-drafter-data"):
        assert command in help_text
    for command in (
        "train-drafter",
        "evaluate-drafter",
        "build-engine",
        "benchmark-engine",
        "measure-overhead",
        "bench-serve",
        "make-report",
        "compare-logits",
    ):
        assert command in help_text
