from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.artifacts import write_artifact
from fourfold.artifacts.files import write_jsonl
from fourfold.config.drafter import DrafterTraining
from fourfold.drafter.plan import make_plan
from fourfold.drafter.samples import Text, epoch_order, group_by_length, hash_share, read_texts, split_held_out
from fourfold.drafter.schedule import learning_rate
from fourfold.drafter.vocabulary import choose_draft_vocabulary, invert
from fourfold.errors import FourfoldError


def texts_of(problems: int, samples: int = 1) -> list[Text]:
    return [
        Text(f"p{i}-{s}", f"p{i}", (1, 2), tuple(range(i % 5 + 2))) for i in range(problems) for s in range(samples)
    ]


def write_data(folder: Path, rows: list[dict[str, object]]) -> Path:
    manifest = folder / "data" / "manifest.json"
    with write_artifact(manifest, stage="generate_drafter_data", settings={}) as staging:
        write_jsonl(staging.path / "train.jsonl", rows)
    return manifest


def row(name: str, prompt: int, answer: int) -> dict[str, object]:
    return {
        "id": name,
        "problem_id": name,
        "prompt_token_ids": [0] * prompt,
        "token_ids": list(range(answer)),
        "seed": 1,
    }


def test_texts_are_cut_to_max_length_and_dropped_when_nothing_can_be_drafted(tmp_path: Path) -> None:
    data = write_data(tmp_path, [row("a", 3, 4), row("b", 3, 9), row("c", 7, 5), row("d", 30, 5), row("e", 2, 1)])
    kept = read_texts(data, max_length=8)
    assert [(text.id, text.token_ids) for text in kept] == [("a", (0, 1, 2, 3)), ("b", (0, 1, 2, 3, 4))]
    assert max(text.length for text in kept) == 8
    with pytest.raises(FourfoldError, match=r"of 5 texts none has two answer tokens within .*max_length=4"):
        read_texts(data, max_length=4)


@settings(max_examples=50, deadline=None)
@given(problems=st.integers(2, 80), samples=st.integers(1, 3), shuffle=st.randoms())
def test_held_out_problems_are_never_trained_on(problems: int, samples: int, shuffle: object) -> None:
    texts = texts_of(problems, samples)
    train, held_out = split_held_out(texts)
    trained = {text.problem_id for text in train}
    judged = {text.problem_id for text in held_out}
    assert trained
    assert judged
    assert not trained & judged
    assert len(train) + len(held_out) == len(texts)
    shuffle.shuffle(texts)  # type: ignore[attr-defined]
    assert {text.problem_id for text in split_held_out(texts)[1]} == judged


def test_the_held_out_share_is_between_5_and_10_percent() -> None:
    _, held_out = split_held_out(texts_of(2000))
    assert 0.05 < len(held_out) / 2000 < 0.10


def test_a_problem_stays_on_its_side_when_others_come() -> None:
    few = {text.problem_id for text in split_held_out(texts_of(200))[1]}
    many = {text.problem_id for text in split_held_out(texts_of(400))[1]}
    assert few == {name for name in many if int(name[1:]) < 200}
    assert all(0 <= hash_share(name) < 1 for name in many)


def test_a_single_problem_cannot_be_split() -> None:
    with pytest.raises(FourfoldError, match=r"raise drafter\.data\.problems"):
        split_held_out(texts_of(1, 5))


@given(sizes=st.lists(st.integers(2, 50), min_size=1, max_size=40), size=st.integers(1, 9))
def test_groups_hold_every_text_once_and_similar_lengths_together(sizes: list[int], size: int) -> None:
    texts = [Text(str(i), str(i), (1,), tuple(range(n))) for i, n in enumerate(sizes)]
    groups = group_by_length(texts, size)
    assert Counter(text.id for group in groups for text in group) == Counter(text.id for text in texts)
    assert all(len(group) == size for group in groups[:-1])
    lengths = [text.length for group in groups for text in group]
    assert lengths == sorted(lengths)


@given(groups=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_the_order_of_an_epoch_is_a_permutation_of_its_own(groups: int, seed: int, epoch: int) -> None:
    order = epoch_order(groups, seed, epoch)
    assert sorted(order) == list(range(groups))
    assert epoch_order(groups, seed, epoch) == order
    if groups > 20:
        assert order != epoch_order(groups, seed, epoch + 1)
        assert order != epoch_order(groups, seed + 1, epoch)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.integers(1, 30), micro=st.integers(1, 4), accumulate=st.integers(1, 3), processes=st.integers(1, 3),
    epochs=st.integers(1, 3),
)  # fmt: skip
def test_a_plan_covers_each_group_once_an_epoch(
    texts: int, micro: int, accumulate: int, processes: int, epochs: int
) -> None:
    training = DrafterTraining(micro_batch_size=micro, gradient_accumulation=accumulate, epochs=epochs)
    plan = make_plan(training, texts_of(texts), texts_of(1), processes)
    seen = [group for step in range(plan.steps) for group in plan.groups_of(step)]
    for epoch in range(epochs):
        part = seen[epoch * len(plan.groups) : (epoch + 1) * len(plan.groups)]
        assert sorted(part) == list(range(len(plan.groups)))
    assert all(len(plan.groups_of(step)) <= accumulate * processes for step in range(plan.steps))


def test_the_drafts_of_a_step_weigh_one_together() -> None:
    training = DrafterTraining(micro_batch_size=2, predict_tokens=2)
    texts = [Text(str(n), str(n), (1,), tuple(range(n))) for n in (3, 4, 6)]
    plan = make_plan(training, texts, texts[:1], processes=1)
    assert [plan.weight_of([0]), plan.weight_of([1])] == [1 / (2 + 3), 1 / 5]
    assert plan.weight_of([0, 1]) == 1 / 10


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 4, 1.0, 0.0) == 1.0
    assert [learning_rate(0, 1, 1.0, ratio) for ratio in (0.0, 0.4, 0.9)] == [1.0, 1.0, 1.0]


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    answers = [[5, 5, 5, 9], [9, 7, 3, 5]]
    assert choose_draft_vocabulary(answers, 2, 20, always=[]).tolist() == [5, 9]
    assert choose_draft_vocabulary(answers, 3, 20, always=[]).tolist() == [3, 5, 9], "a tie goes to the lower id"
    assert choose_draft_vocabulary(answers, 3, 20, always=[19]).tolist() == [5, 9, 19]
    assert choose_draft_vocabulary(answers, 6, 20, always=[19]).tolist() == [0, 3, 5, 7, 9, 19]


@given(
    answers=st.lists(st.lists(st.integers(0, 29), max_size=20), max_size=5),
    size=st.integers(2, 30),
    always=st.sets(st.integers(0, 29), max_size=2),
)
def test_a_draft_vocabulary_has_its_size_and_inverts(answers: list[list[int]], size: int, always: set[int]) -> None:
    chosen = choose_draft_vocabulary(answers, size, 30, sorted(always))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == size
    assert always <= set(chosen.tolist())
    counts = Counter(token for answer in answers for token in answer)
    left_out = [counts[token] for token in range(30) if token not in chosen.tolist()]
    taken = [counts[token] for token in chosen.tolist() if token not in always]
    assert max(left_out, default=0) <= min(taken, default=10**9)
    inverse = invert(chosen, 30)
    assert inverse[chosen].tolist() == list(range(size))
    assert (inverse >= 0).sum() == size


def test_draft_vocabularies_of_impossible_size_are_refused() -> None:
    with pytest.raises(FourfoldError, match="31 exceeds the model's vocabulary of 30"):
        choose_draft_vocabulary([], 31, 30, [])
    with pytest.raises(FourfoldError, match="1 has no room for 2 end-of-text tokens"):
        choose_draft_vocabulary([], 1, 30, [4, 5])


def test_without_a_draft_vocabulary_logits_are_tokens() -> None:
    assert invert(None, 4).tolist() == [0, 1, 2, 3]
