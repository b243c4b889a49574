"""The rolled form of training against the step-by-step form of serving, on random texts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.drafter.graphed_loss import GraphedLoss
from fourfold.drafter.loss import UNREACHED, DraftLoss, make_teacher, rolled_states
from fourfold.drafter.metrics import TOP_K, DraftCounts, label_ranks
from fourfold.drafter.states import Batch
from fourfold.drafter.vocabulary import invert
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig

VOCAB, HIDDEN = 13, 4
Teacher = Callable[[Tensor], Tensor]


@dataclass
class Case:
    batch: Batch
    drafter: Redrafter
    embedding: Tensor
    target_to_draft: Tensor
    texts: list[list[int]]

    def loss(self, positions: int, logits_bytes: int = 2**20, teacher: Teacher | None = None) -> DraftLoss:
        embed = lambda tokens: F.embedding(tokens, self.embedding)  # noqa: E731
        return DraftLoss(self.drafter, embed, self.target_to_draft, positions, teacher, logits_bytes)


def make_case(lengths: list[int], draft_vocab: int | None = None, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vocabulary = None if draft_vocab is None else torch.randperm(VOCAB)[:draft_vocab]
    drafter = Redrafter(RedrafterConfig(VOCAB, HIDDEN, 2 * HIDDEN, draft_vocab_size=draft_vocab), vocabulary)
    texts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
    rows = sum(lengths)
    batch = Batch(
        hidden=torch.randn(rows, HIDDEN, generator=generator),
        tokens=torch.tensor([token for text in texts for token in text]),
        remaining=torch.tensor([left for text in texts for left in range(len(text) - 1, -1, -1)]),
    )
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    return Case(batch, drafter, embedding, invert(vocabulary, VOCAB), texts)


@torch.no_grad()
def count_by_drafting(case: Case, positions: int) -> DraftCounts:
    """Serving's form: one draft at a time, one token at a time, the true tokens fed."""
    counts = DraftCounts.zeros(positions)
    row = 0
    for text in case.texts:
        for start in range(len(text)):
            labels = text[start + 1 : start + 1 + positions]
            state, right = torch.zeros(HIDDEN), True
            counts.drafts += bool(labels)
            for i, label in enumerate(labels):
                state = case.drafter.advance(state, case.embedding[text[start + i]])
                logits = case.drafter.logits(case.batch.hidden[row], state)
                draft_label = int(case.target_to_draft[label])
                counts.labels[i] += 1
                if draft_label >= 0:
                    counts.losses[i] += 1
                    counts.loss[i] -= F.log_softmax(logits, -1)[draft_label]
                    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
                    counts.hits[i] += torch.arange(TOP_K) >= order.index(draft_label)
                right = right and draft_label == int(logits.argmax())
                counts.accepted[i] += right
            row += 1
    return counts


CASES = st.builds(
    make_case,
    st.lists(st.integers(2, 6), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(2, VOCAB)),
    st.integers(0, 10_000),
)


@settings(max_examples=40, deadline=None)
@given(case=CASES, positions=st.integers(1, 4))
def test_the_rolled_form_counts_what_serving_would_draft(case: Case, positions: int) -> None:
    counts = case.loss(positions)(case.batch)
    expected = count_by_drafting(case, positions)
    torch.testing.assert_close(counts.pack(), expected.pack(), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(case=CASES, positions=st.integers(1, 4))
def test_rolled_states_are_the_recurrence(case: Case, positions: int) -> None:
    embeddings = F.pad(case.embedding[case.batch.tokens], (0, 0, 0, positions - 1))
    for i, states in enumerate(rolled_states(case.drafter, embeddings, positions)):
        for row, state in enumerate(states):
            single = torch.zeros(HIDDEN)
            for step in range(i + 1):
                single = case.drafter.advance(single, embeddings[row + step])
            torch.testing.assert_close(state, single)


def reference_loss(case: Case, positions: int, output_rows: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """The weighted loss, one draft and one position after another, and the plain losses by position."""
    total, plain = torch.zeros(()), [0.0] * positions
    row = 0
    for text in case.texts:
        for start in range(len(text)):
            state, reached = torch.zeros(HIDDEN), True
            for i, label in enumerate(text[start + 1 : start + 1 + positions]):
                state = case.drafter.advance(state, case.embedding[text[start + i]])
                scores = torch.log_softmax(case.drafter.logits(case.batch.hidden[row], state), -1)
                draft_label = int(case.target_to_draft[label])
                if draft_label >= 0:
                    wanted = F.one_hot(torch.tensor(draft_label), len(scores)).float()
                    if output_rows is not None:
                        # The row whose next token is the label.
                        wanted = torch.softmax(case.batch.hidden[row + 1 + i] @ output_rows.T, -1)
                    loss = -(wanted * scores).sum()
                    total = total + loss * (1 if reached or output_rows is None else UNREACHED)
                    plain[i] += loss.item()
                reached = reached and int(scores.argmax()) == draft_label
            row += 1
    return total, plain


@torch.no_grad()
def follow_the_drafter(case: Case, positions: int) -> None:
    """Changes the first text so that the first draft is right at so many positions."""
    state = torch.zeros(HIDDEN)
    for i in range(positions):
        state = case.drafter.advance(state, case.embedding[case.texts[0][i]])
        choice = case.drafter.logits(case.batch.hidden[0], state).argmax()
        token = int(choice if case.drafter.draft_to_target is None else case.drafter.draft_to_target[choice])
        case.texts[0][i + 1] = case.batch.tokens[i + 1] = token


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("draft_vocab", [None, 6])
@pytest.mark.parametrize("distil", [False, True])
def test_gradients_are_those_of_drafts_taken_one_by_one(
    rows_at_once: int, draft_vocab: int | None, distil: bool
) -> None:
    case = make_case([6, 3, 5], draft_vocab)
    num_logits = case.drafter.config.num_logits
    follow_the_drafter(case, 2)
    output_rows = torch.randn(num_logits, HIDDEN) if distil else None
    teacher = None if output_rows is None else make_teacher(output_rows)
    counts = case.loss(3, rows_at_once * 4 * num_logits, teacher)(case.batch, torch.tensor(0.5))
    assert counts.accepted[1] > 0
    total, plain = reference_loss(case, 3, output_rows)
    assert counts.loss.tolist() == pytest.approx(plain, rel=1e-5)
    for parameter, gradient in zip(
        case.drafter.parameters(), torch.autograd.grad(0.5 * total, list(case.drafter.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_counts_as_accepted_is_the_token_whatever_the_loss() -> None:
    case = make_case([4, 3], draft_vocab=6)
    counts = case.loss(2, teacher=make_teacher(torch.randn(6, HIDDEN)))(case.batch)
    plain = case.loss(2)(case.batch)
    assert not torch.equal(counts.loss, plain.loss)
    assert torch.equal(counts.accepted, plain.accepted)
    assert torch.equal(counts.hits, plain.hits)


def test_evaluation_leaves_no_gradients() -> None:
    case = make_case([5])
    case.loss(3)(case.batch)
    assert all(parameter.grad is None for parameter in case.drafter.parameters())


def test_labels_outside_the_draft_vocabulary_are_wrong_and_have_no_loss() -> None:
    case = make_case([6], draft_vocab=5)
    inside = int(case.drafter.draft_to_target[0])
    outside = next(token for token in range(VOCAB) if case.target_to_draft[token] < 0)
    case.batch.tokens[:] = torch.tensor([inside, outside, outside, outside, outside, outside])
    counts = case.loss(2)(case.batch, torch.tensor(1.0))
    assert counts.labels.tolist() == [5, 4]
    assert counts.losses.tolist() == [0, 0]
    assert counts.loss.tolist() == [0, 0]
    assert counts.hits.sum() == 0
    assert counts.acceptance_length == 1
    assert all(p.grad is None or not p.grad.any() for p in case.drafter.parameters())


def test_metrics_by_hand() -> None:
    # 10 drafts, two positions: 6 right at the first, 3 of those also at the second; 8 labels there, 4 right at all.
    counts = DraftCounts.zeros(2)
    counts.drafts += 10
    counts.loss += torch.tensor([20.0, 12.0])
    counts.losses += torch.tensor([10.0, 6.0])
    counts.labels += torch.tensor([10.0, 8.0])
    counts.hits += torch.tensor([[6.0, 7, 8, 9, 10], [4.0, 4, 4, 4, 4]])
    counts.accepted += torch.tensor([6.0, 3.0])
    report = counts.report()
    assert report["loss"] == 2.0
    assert report["redrafter0_loss"] == 2.0
    assert report["redrafter1_loss"] == 2.0
    assert report["redrafter0_top1"] == 0.6
    assert report["redrafter0_top5"] == 1.0
    assert report["redrafter1_top1"] == 0.5
    assert report["conditional0"] == 0.6
    assert report["conditional1"] == 0.5
    assert math.isclose(report["simulated_acceptance_length"], 1.9)
    products = report["conditional0"] + report["conditional0"] * report["conditional1"]
    assert math.isclose(report["simulated_acceptance_length"], 1 + products)


@given(seed=st.integers(0, 1000), positions=st.integers(1, 5))
def test_counts_survive_packing_and_add_up(seed: int, positions: int) -> None:
    torch.manual_seed(seed)
    size = DraftCounts.zeros(positions).pack().numel()
    vector = torch.randint(100, (size,)).double()
    counts = DraftCounts.unpack(vector, positions)
    assert torch.equal(counts.pack(), vector)
    counts.add(DraftCounts.unpack(vector, positions))
    assert torch.equal(counts.pack(), 2 * vector)


def test_ranks_break_ties_as_argmax_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 4)
    assert label_ranks(logits, torch.arange(4)).tolist() == [2, 0, 1, 3]


class Uncaptured(GraphedLoss):
    """Computes the loss where a graph would be replayed; counts are in the same place each time, as a graph's are."""

    def _capture(self, compute: Callable[[], DraftCounts]) -> tuple[Callable[[], None], DraftCounts]:
        compute()
        place = DraftCounts.zeros(self.loss.positions)

        def replay() -> None:
            counts = compute()
            for name in vars(place):
                getattr(place, name).copy_(getattr(counts, name))

        return replay, place


def gradients(case: Case) -> list[Tensor]:
    """Of each parameter, zeroed afterwards."""
    found = [parameter.grad.clone() for parameter in case.drafter.parameters()]
    case.drafter.zero_grad(set_to_none=False)
    return found


def test_graphs_of_padded_batches_count_and_differentiate_as_the_loss_does() -> None:
    """Batches of two sizes by turns, gradients of several added up, and none from what comes before a capture."""
    case = make_case([6, 3, 5], draft_vocab=6)
    others = [make_case(lengths, 6, seed).batch for seed, lengths in enumerate(([9, 9, 2], [2, 2], [6, 5]))]
    loss = case.loss(3, teacher=make_teacher(torch.randn(6, HIDDEN)))
    graphed = Uncaptured(loss)
    for parameter in case.drafter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    addresses = [parameter.grad.data_ptr() for parameter in case.drafter.parameters()]
    for weight in (0.5, 0.25, None):
        weight = None if weight is None else torch.tensor(weight)
        expected, counted = DraftCounts.zeros(3), DraftCounts.zeros(3)
        for batch in (case.batch, *others):
            expected.add(loss(batch, weight))
        wanted = gradients(case)
        for batch in (case.batch, *others):
            counted.add(graphed(batch.padded(8), weight))
        torch.testing.assert_close(counted.pack(), expected.pack())
        for got, want in zip(gradients(case), wanted, strict=True):
            torch.testing.assert_close(got, want)
            assert got.any() == (weight is not None)
    assert set(graphed._captured) == {(rows, grad) for rows in (8, 16, 24) for grad in (True, False)}
    assert [parameter.grad.data_ptr() for parameter in case.drafter.parameters()] == addresses


@pytest.mark.parametrize("distil", [False, True])
def test_nothing_of_the_loss_waits_for_values(distil: bool) -> None:
    """On tensors without values, whose shapes are all that there is: what asks for a value fails."""
    case = make_case([6, 3, 5], draft_vocab=6)
    case.drafter.to("meta")
    case.embedding, case.target_to_draft = case.embedding.to("meta"), case.target_to_draft.to("meta")
    batch = Batch(case.batch.hidden.to("meta"), case.batch.tokens.to("meta"), case.batch.remaining.to("meta"))
    teacher = make_teacher(torch.randn(6, HIDDEN, device="meta")) if distil else None
    counts = case.loss(3, teacher=teacher)(batch, torch.ones((), device="meta"))
    assert counts.accepted.shape == (3,)
    assert all(parameter.grad is not None for parameter in case.drafter.parameters())
