"""A drafter's acceptance on held-out problems, with a tiny model."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.config.drafter import DrafterEvaluation
from fourfold.config.problems import Prompt
from fourfold.config.stages import DrafterEvaluationStage
from fourfold.drafter.evaluate import evaluate_drafter
from fourfold.errors import FourfoldError
from fourfold.modeling.redrafter import load_redrafter, save_redrafter


def evaluate(root: Path, drafter: Path, name: str = "evaluation", **changes: Any) -> Path:
    values = {"problems": 3, "max_tokens": 24, "max_num_seqs": 2} | changes
    settings = DrafterEvaluationStage(evaluation=DrafterEvaluation(**values), prompt=Prompt())
    output = root / name / "manifest.json"
    evaluate_drafter(
        settings, root / "model" / "manifest.json", drafter / "manifest.json",
        root / "problems" / "manifest.json", output, "cpu",
    )  # fmt: skip
    return output.parent


def test_rows_add_up_to_the_summary(root: Path, uninterrupted: Path) -> None:
    folder = evaluate(root, uninterrupted)
    with (folder / "acceptance.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "summary.csv").open() as file:
        (summary,) = csv.DictReader(file)
    assert [row["problem_id"] for row in rows] == ["id50", "id51", "id52"]
    for name in ("output_tokens", "drafts", "draft_tokens", "accepted", "accepted_0", "accepted_1", "accepted_2"):
        assert int(summary[name]) == sum(int(row[name]) for row in rows), name
    drafts, accepted = int(summary["drafts"]), int(summary["accepted"])
    assert drafts > 0
    assert accepted == sum(int(summary[f"accepted_{i}"]) for i in range(3))
    assert float(summary["acceptance_length"]) == pytest.approx(1 + accepted / drafts, rel=1e-5)
    assert int(summary["draft_tokens"]) == 3 * drafts
    assert read_manifest(folder / "manifest.json")["acceptance"]["counts_bonus_token"] is True


def test_seen_and_unseen_groups_are_counted_apart_at_each_temperature(root: Path, uninterrupted: Path) -> None:
    folder = evaluate(root, uninterrupted, "kinds", unseen_problems=2, temperatures=[0, 0.7])
    with (folder / "acceptance.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    kinds = [("seen", "0"), ("unseen", "0"), ("seen", "0.7"), ("unseen", "0.7")]
    assert [(row["groups"], row["temperature"]) for row in summary] == kinds
    ids = {"seen": ["id50", "id51", "id52"], "unseen": ["id70", "id71"]}
    for kind, line in zip(kinds, summary, strict=True):
        own = [row for row in rows if (row["groups"], row["temperature"]) == kind]
        assert [row["problem_id"] for row in own] == ids[kind[0]]
        assert int(line["problems"]) == len(own)
        for name in ("output_tokens", "drafts", "accepted"):
            assert int(line[name]) == sum(int(row[name]) for row in own), name
    greedy = evaluate(root, uninterrupted, "greedy")
    first = (greedy / "acceptance.csv").read_text().splitlines()
    assert (folder / "acceptance.csv").read_text().splitlines()[: len(first)] == first


def test_evaluation_is_reproducible(root: Path, uninterrupted: Path) -> None:
    values = {"problems": 2, "temperatures": [0.7]}
    first, second = (evaluate(root, uninterrupted, name, **values) for name in ("once", "again"))
    for name in ("acceptance.csv", "summary.csv", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_drafter_of_another_model_is_refused(root: Path, uninterrupted: Path) -> None:
    drafter = load_redrafter(uninterrupted)
    manifest = root / "other" / "manifest.json"
    with write_artifact(manifest, stage="train_drafter", settings={}) as staging:
        save_redrafter(drafter, staging.path)
        config = json.loads((staging.path / "config.json").read_text())
        (staging.path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
        staging.facts = {"predict_tokens": 3}
    with pytest.raises(FourfoldError, match="the drafter's vocab_size is"):
        evaluate(root, manifest.parent)


def test_too_few_problems_are_refused(root: Path, uninterrupted: Path) -> None:
    with pytest.raises(FourfoldError, match=r"drafter\.evaluation\.problems is 4, but the benchmark split holds 3"):
        evaluate(root, uninterrupted, problems=4)
    with pytest.raises(FourfoldError, match=r"unseen_problems is 3, but the unseen split holds 2"):
        evaluate(root, uninterrupted, unseen_problems=3)
