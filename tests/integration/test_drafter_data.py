"""The drafter's texts on a tiny model: killed, resumed, in any batch."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from drafter_stages import DATA, PROBLEMS, Killed, make_data, problem_rows

from fourfold.artifacts import read_manifest, read_provenance
from fourfold.artifacts.files import read_jsonl
from fourfold.config.drafter import DrafterData
from fourfold.config.problems import Prompt
from fourfold.drafter.journal import Journal
from fourfold.engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer, render_prompt


def test_answers_are_rows_in_the_order_of_problems_and_samples(root: Path) -> None:
    rows = read_jsonl(root / "data" / "train.jsonl")
    assert [row["id"] for row in rows] == [f"id{n}-{s}" for n in range(1, PROBLEMS + 1) for s in range(2)]
    manifest = read_manifest(root / "data" / "manifest.json")
    ends = set(manifest["end_token_ids"])
    tokenizer = load_tokenizer(root / "model")
    for row, problem in zip(rows[::2], problem_rows(PROBLEMS, 1), strict=True):
        assert row["prompt_token_ids"] == render_prompt(tokenizer, Prompt(), problem["problem"])
    for row in rows:
        assert 1 <= len(row["token_ids"]) <= 16
        assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] in ends)
        assert not ends & set(row["token_ids"][:-1])
    assert manifest["answer_tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert rows[0]["token_ids"] != rows[1]["token_ids"], "samples of a problem have seeds of their own"
    assert not list((root / "work").glob("answers-*")), "the journal is gone once its answers are written"


def test_a_killed_generation_resumes_to_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, written = Journal.append, itertools.count(1)

    def append_and_die(self: Journal, row: dict[str, Any]) -> None:
        append(self, row)
        if next(written) == 9:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and_die)
        with pytest.raises(Killed):
            make_data(root, "resumed")
    assert not (root / "resumed").exists()
    (journal,) = (root / "work").glob("answers-*.jsonl")
    assert len(read_jsonl(journal)) == 9
    with journal.open("a") as file:
        file.write('{"id": "id7-0", "tok')  # the line that the kill tore
    appended = []
    monkeypatch.setattr(Journal, "append", lambda self, row: (appended.append(row["id"]), append(self, row)))
    make_data(root, "resumed")
    assert len(appended) == 2 * PROBLEMS - 9, "finished answers are not generated again"
    for name in ("train.jsonl", "manifest.json"):
        assert (root / "resumed" / name).read_bytes() == (root / "data" / name).read_bytes()


def test_the_batch_does_not_change_an_answer(root: Path) -> None:
    alone = DATA.model_copy(update={"data": DATA.data.model_copy(update={"max_num_seqs": 1})})
    make_data(root, "alone", alone)
    assert (root / "alone" / "train.jsonl").read_bytes() == (root / "data" / "train.jsonl").read_bytes()


def test_prompts_that_are_read_together_change_no_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourfold.drafter.data.READ_SHARE", 2)
    waiting = []
    step = LLMEngine.step
    monkeypatch.setattr(LLMEngine, "step", lambda self: (waiting.append(self.num_waiting), step(self))[1])
    make_data(root, "together")
    assert (root / "together" / "train.jsonl").read_bytes() == (root / "data" / "train.jsonl").read_bytes()
    assert waiting.count(1) <= 2, "two of five slots are free before prompts are read, but for the last"


def test_solutions_follow_the_same_prompt_and_end_with_end_of_text(root: Path) -> None:
    settings = DATA.model_copy(update={"data": DrafterData(source="solutions", problems=3)})
    manifest = read_manifest(make_data(root, "solutions", settings))
    rows = read_jsonl(root / "solutions" / "train.jsonl")
    generated = read_jsonl(root / "data" / "train.jsonl")
    tokenizer = load_tokenizer(root / "model")
    assert len(rows) == 3
    for row, other, problem in zip(rows, generated[::2], problem_rows(PROBLEMS, 1), strict=False):
        assert row["prompt_token_ids"] == other["prompt_token_ids"]
        assert row["token_ids"][-1] in manifest["end_token_ids"]
        assert tokenizer.decode(row["token_ids"][:-1]).strip() == problem["solution"]
        assert row["finish_reason"] == "stop"
    assert read_provenance(root / "solutions" / "manifest.json")["device"] is None, "nothing was computed"


def test_too_few_problems_are_refused(root: Path) -> None:
    settings = DATA.model_copy(update={"data": DrafterData(problems=PROBLEMS + 1)})
    with pytest.raises(FourfoldError, match=r"drafter\.data\.problems is 15, but the train split holds 14"):
        make_data(root, "none", settings)
