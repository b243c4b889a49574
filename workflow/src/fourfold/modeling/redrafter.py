"""The ReDrafter: a recurrent network that drafts the target's next tokens (Zhang et al., arXiv 2403.09919).

One definition, used by training and by serving. A draft starts from the target's last hidden state (after its final
norm) at the position that predicted `token_0`, the last token that is certain:

    state_0     = 0
    state_{k+1} = silu(rnn_w(embedding(token_k)) + rnn_u(state_k))      (rnn false: embedding(token_k) + state_k)
    logits_k    = lm_head([input_proj](cat[hidden, state_{k+1}]))       predicts token_{k+1}

The embeddings are the target's own input embeddings. `lm_head` is a chain of residual blocks `x + silu(linear(x))` and
an output matrix without bias.

The checkpoint has recurrent-drafting's own form, which TensorRT-LLM converts too: `config.json` and
`model.safetensors` with `lm_head.{k}.linear.{weight,bias}`, `lm_head.{n}.weight`, `rnn_u.{weight,bias}`,
`rnn_w.weight` and, only where exit_dim is not 2 x hidden_size, `input_proj.{weight,bias}`. A reduced draft vocabulary
is an addition of ours: `lm_head.{n}.weight` then has draft_vocab_size rows and `draft_vocab.safetensors` names the
target's token of each. `vocab_size` stays the target's, so a loader that does not know of it refuses on shape.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold.artifacts.files import dump_json
from fourfold.errors import FourfoldError
from fourfold.modeling.config import TransformerConfig

MODEL_TYPE = "recurrent_drafting_drafter"
WEIGHTS = "model.safetensors"
DRAFT_VOCAB = "draft_vocab.safetensors"
DRAFT_VOCAB_TENSOR = "draft_to_target"


@dataclass(frozen=True)
class RedrafterConfig:
    """Shape of a ReDrafter, in recurrent-drafting's terms.

    Raises FourfoldError when a size is not a positive number or the draft vocabulary is larger than the target's.
    """

    vocab_size: int
    """The target's vocabulary."""
    hidden_size: int
    """Width of the target's hidden states and of the recurrent state."""
    exit_dim: int
    """Width of the residual blocks; 2 x hidden_size needs no input projection."""
    num_draft_layers: int = 2
    """Residual blocks before the output matrix."""
    rnn: bool = True
    """Combine draft tokens by the recurrence; if false, by summing their embeddings."""
    draft_vocab_size: int | None = None
    """Rows of the output matrix, if they are fewer than vocab_size."""

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "exit_dim", "num_draft_layers"]
        sizes += ["draft_vocab_size"] if self.draft_vocab_size is not None else []
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise FourfoldError(f"drafter {name}: {value!r} is not a positive number")
        if type(self.rnn) is not bool:
            raise FourfoldError(f"drafter rnn: {self.rnn!r} is neither true nor false")
        if self.num_logits > self.vocab_size:
            raise FourfoldError(f"drafter draft_vocab_size: {self.num_logits} exceeds vocab_size {self.vocab_size}")

    @property
    def num_logits(self) -> int:
        """Tokens that can be drafted: the width of the logits."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def has_input_proj(self) -> bool:
        """Whether the input must be projected to exit_dim."""
        return self.exit_dim != 2 * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """Content of `config.json`."""
        values: dict[str, Any] = {
            "architectures": ["Drafter"],
            "model_type": MODEL_TYPE,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "exit_dim": self.exit_dim,
            "num_draft_layers": self.num_draft_layers,
            "rnn": self.rnn,
        }
        if self.draft_vocab_size is not None:
            values["draft_vocab_size"] = self.draft_vocab_size
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RedrafterConfig":
        """Reads the content of `config.json`; keys that it does not know are left alone. Raises FourfoldError."""
        if values.get("model_type") != MODEL_TYPE:
            raise FourfoldError(f"model_type is {values.get('model_type')!r}, {MODEL_TYPE!r} expected")
        required = ["vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn"]
        for name in required:
            if name not in values:
                raise FourfoldError(f"drafter {name} is missing")
        return cls(**{name: values[name] for name in required}, draft_vocab_size=values.get("draft_vocab_size"))


class ResidualBlock(nn.Module):
    """x + silu(linear(x)), [..., exit_dim] → [..., exit_dim]; with zero weights it is the identity."""

    def __init__(self, exit_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(exit_dim, exit_dim)

    def forward(self, x: Tensor) -> Tensor:  # x: [..., exit_dim]
        """Applies the block."""
        return x + F.silu(self.linear(x))


class Redrafter(nn.Module):
    """The drafter's network. Its linear layers are plain attributes, so that an engine may put its own in place.

    Attributes:
        draft_to_target: int64 [draft_vocab_size], the target's token of each logit; None where logits are over the
            target's whole vocabulary.
    """

    draft_to_target: Tensor | None

    def __init__(self, config: RedrafterConfig, draft_to_target: Tensor | None = None) -> None:
        super().__init__()
        if (draft_to_target is None) != (config.draft_vocab_size is None):
            raise FourfoldError("a drafter with draft_vocab_size needs the list of its tokens, and no other has one")
        if draft_to_target is not None:
            check_draft_vocabulary(draft_to_target, config)
        self.config = config
        blocks = [ResidualBlock(config.exit_dim) for _ in range(config.num_draft_layers)]
        self.lm_head = nn.Sequential(*blocks, nn.Linear(config.exit_dim, config.num_logits, bias=False))
        self.input_proj = nn.Linear(2 * config.hidden_size, config.exit_dim) if config.has_input_proj else None
        self.rnn_u = nn.Linear(config.hidden_size, config.hidden_size) if config.rnn else None
        self.rnn_w = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.rnn else None
        self.register_buffer("draft_to_target", draft_to_target, persistent=False)

    def advance(self, state: Tensor, embedding: Tensor) -> Tensor:
        """One step of the recurrence: the state after one more token.

        Args:
            state: [..., hidden_size], zeros before the first token.
            embedding: [..., hidden_size], the target's input embedding of the token.
        Returns [..., hidden_size].
        """
        if self.rnn_w is None or self.rnn_u is None:
            return embedding + state
        return F.silu(self.rnn_w(embedding) + self.rnn_u(state))

    def logits(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Scores of the next draft token.

        Args:
            hidden: [..., hidden_size], the target's last hidden state where the draft starts.
            state: [..., hidden_size], the recurrent state after the last token.
        Returns [..., num_logits], over the draft vocabulary if there is one.
        """
        x = torch.cat([hidden, state], dim=-1)
        if self.input_proj is not None:
            x = self.input_proj(x)
        return self.lm_head(x)


def check_draft_vocabulary(draft_to_target: Tensor, config: RedrafterConfig) -> None:
    """Raises FourfoldError unless the map is int64 [draft_vocab_size] of different tokens of the target."""
    wanted = [config.draft_vocab_size]
    if draft_to_target.dtype != torch.int64 or list(draft_to_target.shape) != wanted:
        given = f"{draft_to_target.dtype} {list(draft_to_target.shape)}"
        raise FourfoldError(f"{DRAFT_VOCAB_TENSOR} is {given}, torch.int64 {wanted} expected")
    if draft_to_target.device.type == "meta":
        return
    if draft_to_target.min() < 0 or draft_to_target.max() >= config.vocab_size:
        raise FourfoldError(f"{DRAFT_VOCAB_TENSOR} names tokens outside the vocabulary of {config.vocab_size}")
    if draft_to_target.unique().numel() != draft_to_target.numel():
        raise FourfoldError(f"{DRAFT_VOCAB_TENSOR} names a token twice")


def check_target(config: RedrafterConfig, target: TransformerConfig, directory: Path) -> None:
    """Raises FourfoldError when the drafter in `directory` was made for another model."""
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(target, name):
            raise FourfoldError(
                f"{directory}: the drafter's {name} is {getattr(config, name)}, the model's {getattr(target, name)}; "
                "train a drafter for this model"
            )


def save_redrafter(drafter: Redrafter, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `config.json`, `model.safetensors` and, with a draft vocabulary, `draft_vocab.safetensors`.

    Args:
        drafter: the network.
        directory: an existing directory.
        dtype: what the weights are rounded to; None keeps theirs.
    """
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in drafter.state_dict().items()}
    config = drafter.config.to_json() | {"torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(dump_json(config), encoding="utf-8")
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    if drafter.draft_to_target is not None:
        save_file({DRAFT_VOCAB_TENSOR: drafter.draft_to_target.cpu().contiguous()}, directory / DRAFT_VOCAB)


def load_redrafter(directory: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Redrafter:
    """Reads a drafter checkpoint, in inference mode.

    Args:
        directory: holds `config.json`, `model.safetensors` and, with a draft vocabulary, `draft_vocab.safetensors`.
        dtype: dtype of the weights; None keeps the file's.
        device: where they go.
    Raises FourfoldError naming the file, and the tensor that is missing, unknown or of the wrong shape.
    """
    config = read_config(directory / "config.json")
    draft_to_target = None
    if config.draft_vocab_size is not None:
        tensors = read_tensors(directory / DRAFT_VOCAB, device)
        if DRAFT_VOCAB_TENSOR not in tensors:
            raise FourfoldError(f"{directory / DRAFT_VOCAB}: {DRAFT_VOCAB_TENSOR} is missing")
        draft_to_target = tensors[DRAFT_VOCAB_TENSOR]
    state = read_tensors(directory / WEIGHTS, device)
    try:
        with torch.device("meta"):
            drafter = Redrafter(config, draft_to_target)
    except FourfoldError as error:
        raise FourfoldError(f"{directory / DRAFT_VOCAB}: {error}") from None
    check_tensors(state, {name: value.shape for name, value in drafter.state_dict().items()}, directory / WEIGHTS)
    drafter.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return drafter.eval().requires_grad_(False)


def read_config(path: Path) -> RedrafterConfig:
    """Reads a drafter's `config.json`. Raises FourfoldError naming the file and the key."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise FourfoldError("not a JSON object")
        return RedrafterConfig.from_json(values)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, FourfoldError) as error:
        raise FourfoldError(f"{path}: {' '.join(str(error).split())}") from None


def read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises FourfoldError when it is missing or cut."""
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise FourfoldError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def check_tensors(state: dict[str, Tensor], expected: dict[str, torch.Size], path: Path) -> None:
    """Raises FourfoldError naming the first tensor that is missing, unknown or of another shape than expected."""
    for name, shape in expected.items():
        if name not in state:
            raise FourfoldError(f"{path}: tensor {name} is missing")
        if state[name].shape != shape:
            raise FourfoldError(f"{path}: {name} is {list(state[name].shape)}, {list(shape)} expected by config.json")
    for name in state:
        if name not in expected:
            raise FourfoldError(f"{path}: unknown tensor {name} (config.json has no place for it)")
