from pathlib import Path

import pytest
import torch
from tiny_models import save_reference, tiny_reference

from fourfold.drafter.initial import HEAD_SCALE, initial_redrafter, output_rows
from fourfold.drafter.samples import Text
from fourfold.drafter.states import TargetStates, answer_states, answer_tokens
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import RedrafterConfig
from fourfold.modeling.transformer import Transformer

LENGTHS = [(7, 4), (3, 9), (12, 2), (5, 6)]
"""Prompt and answer tokens of each text."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tiny_reference(), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Transformer:
    return load_transformer(checkpoint, "cpu")


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """Greedy answers of transformers' own model to random prompts."""
    torch.manual_seed(1)
    model = tiny_reference()
    made = []
    for number, (prompt, answer) in enumerate(LENGTHS):
        tokens = torch.randint(320, (1, prompt))
        with torch.no_grad():
            for _ in range(answer):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        ids = tuple(tokens[0].tolist())
        made.append(Text(str(number), str(number), ids[:prompt], ids[prompt:]))
    return made


def test_each_row_is_the_position_that_predicted_its_token(target: Transformer, texts: list[Text]) -> None:
    hidden = answer_states(target, texts)
    tokens, remaining = answer_tokens(texts, torch.device("cpu"))
    assert tokens.tolist() == [token for text in texts for token in text.token_ids]
    assert remaining.tolist() == [left for _, answer in LENGTHS for left in range(answer - 1, -1, -1)]
    assert target.logits(hidden).argmax(-1).tolist() == tokens.tolist(), "the answers are greedy"


def test_padding_does_not_reach_a_text(target: Transformer, texts: list[Text]) -> None:
    together = answer_states(target, texts)
    alone = torch.cat([answer_states(target, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each forward of a target has had."""
    texts: list[int] = []
    run = Transformer.hidden_states
    monkeypatch.setattr(Transformer, "hidden_states", lambda self, ids: (texts.append(ids.shape[0]), run(self, ids))[1])
    return texts


def test_states_are_kept_up_to_their_bound(target: Transformer, texts: list[Text], computed: list[int]) -> None:
    groups = [texts[:2], texts[2:]]
    first_bytes = sum(len(text.token_ids) for text in groups[0]) * (target.config.hidden_size * 4 + 2 * 8)
    states = TargetStates(target, groups, keep_bytes=first_bytes)
    first = [states.batch(group).hidden for group in (0, 1)]
    second = [states.batch(group).hidden for group in (0, 1)]
    assert computed == [2, 2, 2], "the first group is kept, the second is computed again"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gpu_reads_neighbouring_groups_together(target: Transformer, texts: list[Text], computed: list[int]) -> None:
    groups = [[text] for text in texts]
    alone = [TargetStates(target, groups).batch(group) for group in range(4)]
    for together, keep_bytes, expected in ((10**6, 10**6, [3, 1]), (28, 10**6, [2, 1, 1]), (10**6, 0, [1, 1, 1, 1])):
        states = TargetStates(target, groups, keep_bytes)
        states.together = together
        computed.clear()
        for group in (1, 3, 0, 2):
            batch = states.batch(group)
            for name in ("hidden", "tokens", "remaining"):
                torch.testing.assert_close(getattr(batch, name), getattr(alone[group], name), rtol=1e-5, atol=1e-5)
        assert computed == expected


def test_a_batch_is_filled_up_with_rows_that_start_no_draft(target: Transformer, texts: list[Text]) -> None:
    states = TargetStates(target, [texts])
    batch = states.batch(0)
    assert len(batch.tokens) == sum(answer for _, answer in LENGTHS), "none on a CPU"
    for multiple, rows in ((8, 24), (7, 21), (50, 50)):
        padded = batch.padded(multiple)
        for name in ("hidden", "tokens", "remaining"):
            values, before = getattr(padded, name), getattr(batch, name)
            assert len(values) == rows
            assert torch.equal(values[: len(before)], before)
            assert not values[len(before) :].any()


def test_the_targets_output_matrix_is_read_through_its_packed_layer(target: Transformer, checkpoint: Path) -> None:
    weight = tiny_reference().get_output_embeddings().weight.float()
    assert torch.equal(output_rows(target, None), weight)
    assert torch.equal(output_rows(target, torch.tensor([9, 2, 300])), weight[[9, 2, 300]])


@pytest.mark.parametrize(("exit_dim", "vocabulary"), [(128, None), (128, 40), (96, 40), (64, None)])
def test_a_drafter_starts_from_the_targets_output(target: Transformer, exit_dim: int, vocabulary: int | None) -> None:
    config = RedrafterConfig(320, 64, exit_dim, draft_vocab_size=vocabulary)
    tokens = None if vocabulary is None else torch.arange(vocabulary) * 7 + 3
    drafter = initial_redrafter(config, tokens, target, seed=5)
    hidden, state = torch.randn(2, 6, 64)
    expected = target.logits(hidden)
    if tokens is not None:
        expected = expected[:, tokens]
    torch.testing.assert_close(drafter.logits(hidden, state), HEAD_SCALE * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, torch.arange(40)])
def test_a_tokens_embedding_moves_the_state(target: Transformer, tokens: torch.Tensor | None) -> None:
    config = RedrafterConfig(320, 64, 128, draft_vocab_size=None if tokens is None else 40)
    drafter = initial_redrafter(config, tokens, target, seed=5)
    assert drafter.rnn_w is not None
    moved = drafter.rnn_w(target.embed(torch.arange(320) if tokens is None else tokens))
    assert moved.var().item() == pytest.approx(1, rel=0.15)


def test_the_start_depends_on_the_seed_alone(target: Transformer) -> None:
    config = RedrafterConfig(320, 64, 128)
    torch.manual_seed(0)
    first = initial_redrafter(config, None, target, seed=5).state_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = initial_redrafter(config, None, target, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"
    other = initial_redrafter(config, None, target, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["rnn_u.weight"], other["rnn_u.weight"])
