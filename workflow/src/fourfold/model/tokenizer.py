"""The model's tokenizer and chat template: how a problem becomes tokens, and which tokens end an answer."""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fourfold.config.problems import Prompt
from fourfold.errors import FourfoldError

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
)
"""Patterns of the files of a tokenizer and its chat template."""


def load_tokenizer(artifact_dir: Path, place: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint directory; never asks the network.

    Args:
        artifact_dir: the directory.
        place: what the messages call it, if not by its path.
    Raises FourfoldError when the directory holds no tokenizer or no chat template.
    """
    where = place or str(artifact_dir)
    try:
        config = _config_to_choose_by(artifact_dir)
        tokenizer = AutoTokenizer.from_pretrained(artifact_dir, config=config, local_files_only=True)
    except Exception as error:  # transformers' errors and the tokenizers library's share no base
        reason = " ".join(str(error).split())[:200]
        raise FourfoldError(f"{where}: no tokenizer can be loaded ({reason}); fetch the model again") from None
    if not tokenizer.chat_template:
        raise FourfoldError(f"{where}: the tokenizer has no chat template; choose an instruction-tuned model")
    return tokenizer


def _config_to_choose_by(artifact_dir: Path) -> PretrainedConfig | None:
    """What `AutoTokenizer` needs of the model's configuration; None where it has to read that itself.

    The tokenizer's class comes from the model's type and from the class that tokenizer_config.json names. Left to
    itself, `AutoTokenizer` imports the model's own configuration class, and with it two seconds of PyTorch's compiler.
    """
    try:
        model = json.loads((artifact_dir / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((artifact_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = isinstance(model["model_type"], str) and isinstance(tokenizer["tokenizer_class"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not named or "auto_map" in tokenizer:
        return None
    return PretrainedConfig(**{"model_type": model["model_type"]})


def messages(prompt: Prompt, problem: str) -> list[dict[str, str]]:
    """The conversation that asks for an answer: the system message, if there is one, and the user's."""
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    # str.replace, not str.format: problems and prompts are full of LaTeX braces.
    return [*system, {"role": "user", "content": prompt.user.replace("{problem}", problem)}]


def _render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], *, answering: bool) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answering)
    except TemplateError as error:
        raise FourfoldError(f"prompt: the model's chat template refuses it ({error}); change prompt.system") from None
    return str(text)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, problem: str) -> list[int]:
    """Token ids of the prompt, up to and with the marker after which the assistant answers."""
    return encode_rendered(tokenizer, _render(tokenizer, messages(prompt, problem), answering=True))


def render_conversation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, problem: str, solution: str) -> str:
    """The problem and its answer as text in the chat template; tokenize it with `encode_rendered`."""
    answer = {"role": "assistant", "content": solution}
    return _render(tokenizer, [*messages(prompt, problem), answer], answering=False)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that a chat template made: it holds its special tokens already, so none are added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def end_token_ids(artifact_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end an answer, ascending: those of `generation_config.json` and the tokenizer's own.

    Raises FourfoldError when there are none: generation would never stop.
    """
    ids: set[int] = set()
    path = artifact_dir / "generation_config.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise FourfoldError(f"{path.name}: not a JSON object; correct it in the model's files") from None
        named = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in named):
            raise FourfoldError(
                f"{path.name}: eos_token_id is {found!r}; a token's number, or a list of them, is expected"
            )
        ids.update(named)
    own = tokenizer.eos_token_id
    if isinstance(own, int):
        ids.add(own)
    if not ids:
        raise FourfoldError(f"{artifact_dir}: neither generation_config.json nor the tokenizer names an end token")
    return tuple(sorted(ids))
