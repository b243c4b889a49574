import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fourfold.artifacts.tensors import read_header
from fourfold.errors import FourfoldError
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, load_redrafter, save_redrafter

PLAIN = RedrafterConfig(vocab_size=11, hidden_size=4, exit_dim=8)


def make(config: RedrafterConfig, seed: int = 0) -> Redrafter:
    torch.manual_seed(seed)
    size = config.draft_vocab_size
    return Redrafter(config, None if size is None else torch.randperm(config.vocab_size)[:size])


GOLDEN = {
    "full vocabulary": (
        PLAIN,
        {
            "lm_head.0.linear.bias": [8],
            "lm_head.0.linear.weight": [8, 8],
            "lm_head.1.linear.bias": [8],
            "lm_head.1.linear.weight": [8, 8],
            "lm_head.2.weight": [11, 8],
            "rnn_u.bias": [4],
            "rnn_u.weight": [4, 4],
            "rnn_w.weight": [4, 4],
        },
    ),
    "projected, draft vocabulary": (
        RedrafterConfig(11, 4, 6, num_draft_layers=1, draft_vocab_size=5),
        {
            "input_proj.bias": [6],
            "input_proj.weight": [6, 8],
            "lm_head.0.linear.bias": [6],
            "lm_head.0.linear.weight": [6, 6],
            "lm_head.1.weight": [5, 6],
            "rnn_u.bias": [4],
            "rnn_u.weight": [4, 4],
            "rnn_w.weight": [4, 4],
        },
    ),
    "no recurrence": (
        RedrafterConfig(11, 4, 8, num_draft_layers=1, rnn=False),
        {"lm_head.0.linear.bias": [8], "lm_head.0.linear.weight": [8, 8], "lm_head.1.weight": [11, 8]},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_checkpoint_has_recurrent_draftings_names_and_shapes(case: str, tmp_path: Path) -> None:
    config, golden = GOLDEN[case]
    save_redrafter(make(config), tmp_path)
    header = read_header(tmp_path / "model.safetensors")
    assert {name: tensor["shape"] for name, tensor in header.items()} == golden
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}


def test_config_json_keeps_the_targets_vocabulary(tmp_path: Path) -> None:
    save_redrafter(make(GOLDEN["projected, draft vocabulary"][0]), tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["Drafter"],
        "draft_vocab_size": 5,
        "exit_dim": 6,
        "hidden_size": 4,
        "model_type": "recurrent_drafting_drafter",
        "num_draft_layers": 1,
        "rnn": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 11,
    }
    assert "draft_vocab_size" not in PLAIN.to_json()


@pytest.mark.parametrize("case", GOLDEN)
def test_what_is_saved_is_what_is_loaded(case: str, tmp_path: Path) -> None:
    drafter = make(GOLDEN[case][0])
    save_redrafter(drafter, tmp_path)
    loaded = load_redrafter(tmp_path)
    assert loaded.config == drafter.config
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    if drafter.draft_to_target is None:
        assert loaded.draft_to_target is None
        assert not (tmp_path / "draft_vocab.safetensors").exists()
    else:
        assert torch.equal(loaded.draft_to_target, drafter.draft_to_target)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    hidden, state = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(loaded.logits(hidden, state), drafter.logits(hidden, state))


def test_the_same_drafter_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    config = GOLDEN["projected, draft vocabulary"][0]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_redrafter(make(config), tmp_path / name)
    for file in ("config.json", "model.safetensors", "draft_vocab.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loading_can_change_the_dtype_of_weights_but_not_of_the_draft_vocabulary(tmp_path: Path) -> None:
    save_redrafter(make(GOLDEN["projected, draft vocabulary"][0]), tmp_path)
    loaded = load_redrafter(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.draft_to_target.dtype == torch.int64


def test_the_recurrence_is_the_papers() -> None:
    drafter = make(PLAIN)
    weights = drafter.state_dict()
    hidden, first, second = torch.randn(3, 4).unbind()
    state = F.silu(weights["rnn_w.weight"] @ first + weights["rnn_u.bias"])
    state = F.silu(weights["rnn_w.weight"] @ second + weights["rnn_u.weight"] @ state + weights["rnn_u.bias"])
    x = torch.cat([hidden, state])
    for block in ("lm_head.0.linear", "lm_head.1.linear"):
        x = x + F.silu(weights[f"{block}.weight"] @ x + weights[f"{block}.bias"])
    advanced = drafter.advance(drafter.advance(torch.zeros(4), first), second)
    torch.testing.assert_close(advanced, state)
    torch.testing.assert_close(drafter.logits(hidden, advanced), weights["lm_head.2.weight"] @ x)


def test_without_the_recurrence_embeddings_are_summed() -> None:
    drafter = make(GOLDEN["no recurrence"][0])
    first, second = torch.randn(2, 4).unbind()
    assert torch.equal(drafter.advance(drafter.advance(torch.zeros(4), first), second), first + second)


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(st.integers(1, 3), max_size=2), case=st.sampled_from(sorted(GOLDEN)), seed=st.integers(0, 99))
def test_any_leading_shape_is_computed_row_by_row(batch: list[int], case: str, seed: int) -> None:
    drafter = make(GOLDEN[case][0], seed)
    hidden, state, embedding = torch.randn(3, *batch, 4).unbind()
    logits = drafter.logits(hidden, drafter.advance(state, embedding))
    assert logits.shape == (*batch, drafter.config.num_logits)
    rows = zip(hidden.reshape(-1, 4), state.reshape(-1, 4), embedding.reshape(-1, 4), strict=True)
    expected = torch.stack([drafter.logits(h, drafter.advance(s, e)) for h, s, e in rows])
    torch.testing.assert_close(logits.reshape(expected.shape), expected)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_broken_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    config = GOLDEN["projected, draft vocabulary"][0]
    weights, vocabulary = tmp_path / "model.safetensors", tmp_path / "draft_vocab.safetensors"

    def check(message: str) -> None:
        with pytest.raises(FourfoldError, match=message) as caught:
            load_redrafter(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
        save_redrafter(make(config), tmp_path)

    check(r"config\.json: .*No such file")
    rewrite(weights, **{"rnn_u.bias": None})
    check(r"model\.safetensors: tensor rnn_u\.bias is missing")
    rewrite(weights, **{"lm_head.1.weight": torch.zeros(11, 6)})
    check(r"lm_head\.1\.weight is \[11, 6\], \[5, 6\] expected")
    rewrite(weights, **{"lm_head.7.weight": torch.zeros(1)})
    check(r"unknown tensor lm_head\.7\.weight")
    weights.write_bytes(weights.read_bytes()[:-5])
    check(r"model\.safetensors: cannot be read")
    weights.unlink()
    check(r"model\.safetensors: cannot be read")
    vocabulary.unlink()
    check(r"draft_vocab\.safetensors: cannot be read")
    rewrite(vocabulary, draft_to_target=torch.tensor([0, 1, 2, 3, 3]))
    check(r"draft_vocab\.safetensors: draft_to_target names a token twice")
    rewrite(vocabulary, draft_to_target=torch.tensor([0, 1, 2, 3, 11]))
    check("outside the vocabulary of 11")
    rewrite(vocabulary, draft_to_target=torch.arange(4))
    check(r"draft_to_target is torch\.int64 \[4\], torch\.int64 \[5\] expected")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', 'recurrent_drafting_drafter' expected"),
        ({"exit_dim": 0}, "exit_dim: 0 is not a positive number"),
        ({"hidden_size": "4"}, "hidden_size: '4' is not a positive number"),
        ({"draft_vocab_size": 12}, "draft_vocab_size: 12 exceeds vocab_size 11"),
        ({"rnn": 1}, "rnn: 1 is neither true nor false"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        RedrafterConfig.from_json(PLAIN.to_json() | change)


def test_a_missing_key_is_named() -> None:
    values = PLAIN.to_json()
    del values["rnn"]
    with pytest.raises(FourfoldError, match="drafter rnn is missing"):
        RedrafterConfig.from_json(values)


def test_other_keys_of_the_config_are_left_alone() -> None:
    assert RedrafterConfig.from_json(PLAIN.to_json() | {"num_lookback_tokens": 0}) == PLAIN


def test_the_draft_vocabulary_and_its_size_go_together() -> None:
    with pytest.raises(FourfoldError, match="needs the list of its tokens"):
        Redrafter(RedrafterConfig(11, 4, 8, draft_vocab_size=5))
    with pytest.raises(FourfoldError, match="no other has one"):
        Redrafter(PLAIN, torch.arange(11))
