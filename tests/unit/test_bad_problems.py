"""Files of problems that must be refused, as data in bad_input/problems.yaml, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from refused import check_refusal, fourfold, old_artifact

from fourfold.artifacts import write_artifact
from fourfold.artifacts.files import read_jsonl
from fourfold.errors import FourfoldError
from fourfold.problems.read import read_problems
from fourfold.problems.sources import local_rows

CASES = yaml.safe_load((Path(__file__).parent / "bad_input" / "problems.yaml").read_text(encoding="utf-8"))
ROW = {"problem": "1 + 1?", "solution": "It is 2.", "answer": "2"}


def settings(path: Path) -> str:
    return json.dumps({"source": "local", "path": str(path), "splits": {"train": 1, "calibration": 1, "benchmark": 1}})


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_broken_file_is_one_line(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(case["text"] if isinstance(case["text"], bytes) else case["text"].encode())
    output = old_artifact(tmp_path / "problems")
    check_refusal(tmp_path, case["message"], "fetch-problems", "--settings", settings(path), "--output", output)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"problem": "a"}\n{"problem": "\xe4"}\n', "line 2: not UTF-8"),
        (b'{"a": ' + b"[" * 200_000 + b"\n", "line 1: cannot be read"),
        (b'{"answer": ' + b"1" * 5000 + b"}\n", "line 1: cannot be read .*4300"),
    ],
)
def test_lines_that_json_alone_would_stumble_over(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(FourfoldError, match=message):
        read_jsonl(path)


def test_byte_order_marks_blank_lines_and_repeats_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [ROW, {**ROW, "problem": "3?", "answer": 3}, ROW]
    path.write_text("\r\n\r\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert [(row.problem, row.answer) for row in local_rows(path)] == [("1 + 1?", "2"), ("3?", "3"), ("1 + 1?", "2")]


@pytest.mark.parametrize("path", ["none.jsonl", "."])
def test_a_path_that_is_no_file_is_one_line(path: str, tmp_path: Path) -> None:
    output = old_artifact(tmp_path / "problems")
    message = r"problems\.path: .*(No such file|Is a directory)"
    given = settings(tmp_path / path)
    check_refusal(tmp_path, message, "fetch-problems", "--settings", given, "--output", output)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", **ROW, "group": ""}] * 2, "line 2: an id that an earlier line has; delete"),
        ([{"id": "a", **ROW}], "line 1: the keys id, problem, solution, answer; delete"),
        ([{"id": "a", **ROW, "group": "", "level": 3}], "line 1: the keys .*level"),
    ],
)
def test_an_artifact_that_was_changed_is_one_line(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    manifest = tmp_path / "problems" / "manifest.json"
    with write_artifact(manifest, stage="fetch_problems", settings={}) as staging:
        (staging.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FourfoldError, match=message):
        read_problems(manifest, "train")


def test_another_stage_s_artifact_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "other" / "manifest.json"
    with write_artifact(manifest, stage="fetch_model", settings={}):
        pass
    with pytest.raises(FourfoldError, match="made by fetch_model; give the manifest that fetch_problems wrote"):
        read_problems(manifest, "train")


def test_whole_files_pass(tmp_path: Path) -> None:
    """The runner itself: what is right ends with exit code 0 and leaves an artifact."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({**ROW, "problem": f"{i} + 1?"}) + "\n" for i in range(60)))
    output = tmp_path / "problems" / "manifest.json"
    assert fourfold("fetch-problems", "--settings", settings(path), "--output", output)[0] == 0
    assert len(read_problems(output, "train")) == 1
