"""Drafters of recurrent-drafting and ours are the same files: what one saves, the other loads and computes alike.

The package is not on PyPI (envs/recurrent-drafting.yaml). Where it is missing, a model of transformers stands for it:
the same modules under the same names, saved and loaded by transformers as the package's model is.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, load_redrafter, save_redrafter

SHAPES = {
    "two blocks": {"exit_dim": 16},
    "projected": {"exit_dim": 12, "num_draft_layers": 1},
    "summed": {"exit_dim": 16, "rnn": False},
}


class FormatConfig(PretrainedConfig):
    """The keys of its config.json."""

    model_type = "recurrent_drafting_drafter"

    def __init__(self, **values: Any) -> None:
        for name, default in {"vocab_size": 0, "hidden_size": 0, "exit_dim": 0, "num_draft_layers": 0}.items():
            setattr(self, name, values.pop(name, default))
        self.rnn = values.pop("rnn", True)
        super().__init__(**values)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Format(PreTrainedModel):
    """The modules of its checkpoint."""

    config_class = FormatConfig

    def __init__(self, config: FormatConfig) -> None:
        super().__init__(config)
        hidden, width = config.hidden_size, config.exit_dim
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        blocks = [Block(width) for _ in range(config.num_draft_layers)]
        self.lm_head = nn.Sequential(*blocks, nn.Linear(width, config.vocab_size, bias=False))
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        self.post_init()


def theirs() -> tuple[Any, Any]:
    """The package's classes of model and configuration, or those of its format."""
    try:
        from recurrent_drafting.configuration_drafter import DrafterConfig
        from recurrent_drafting.modeling_drafter import Drafter
    except ModuleNotFoundError:
        return Format, FormatConfig
    return Drafter, DrafterConfig


def logits(drafter: Any, hidden: Tensor, state: Tensor) -> Tensor:
    x = torch.cat([hidden, state], dim=-1)
    return drafter.lm_head(drafter.input_proj(x) if hasattr(drafter, "input_proj") else x)


def config(shape: dict[str, Any]) -> RedrafterConfig:
    return RedrafterConfig(**{"vocab_size": 24, "hidden_size": 8, **shape})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_we_save_it_loads(shape: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = Redrafter(config(shape)).eval()
    save_redrafter(ours, tmp_path)
    model, _ = theirs()
    loaded, report = model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert loaded.config.num_draft_layers == ours.config.num_draft_layers
    assert loaded.state_dict().keys() == ours.state_dict().keys()
    hidden, state = torch.randn(3, 8), torch.randn(3, 8)
    with torch.inference_mode():
        assert torch.equal(logits(loaded.eval(), hidden, state), ours.logits(hidden, state))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_it_saves_we_load(shape: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, kind = theirs()
    drafter = model(kind(**vars_of(config(shape)))).eval()
    drafter.save_pretrained(tmp_path)
    ours = load_redrafter(tmp_path)
    assert ours.config == config(shape)
    hidden, state = torch.randn(3, 8), torch.randn(3, 8)
    with torch.inference_mode():
        assert torch.equal(ours.logits(hidden, state), logits(drafter, hidden, state))


@pytest.mark.parametrize("rnn", [True, False])
def test_it_and_we_draft_the_same_tokens(rnn: bool, tmp_path: Path) -> None:
    """The package's own search over one beam, against our recurrence."""
    package = pytest.importorskip("recurrent_drafting.modeling_drafter", reason="recurrent-drafting is not installed")
    torch.manual_seed(0)
    ours = Redrafter(config({"exit_dim": 16, "rnn": rnn})).eval()
    save_redrafter(ours, tmp_path)
    embedding = nn.Embedding(24, 8)
    hidden, token = torch.randn(1, 8), torch.tensor([5])
    with torch.inference_mode():
        beams, _ = package.Drafter.from_pretrained(tmp_path).beam_search_candidates(
            hidden, token, embedding, package.BeamShape(1, 4)
        )
        state, drafts = torch.zeros(1, 8), [5]
        for _ in range(3):
            state = ours.advance(state, embedding(torch.tensor([drafts[-1]])))
            drafts.append(int(ours.logits(hidden, state).argmax()))
    assert beams[0, 0].tolist() == drafts


def vars_of(shape: RedrafterConfig) -> dict[str, Any]:
    """What its configuration is made with."""
    return {name: getattr(shape, name) for name in ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")}
