"""The texts that the drafter learns from: prompts with answers, cut to length, split and grouped."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import read_jsonl
from fourfold.errors import FourfoldError

HELD_OUT_SHARE = 0.08
DATA_FILE = "train.jsonl"


@dataclass(frozen=True)
class Text:
    """A prompt with its answer, as token ids; the answer holds its end-of-text token unless it was cut."""

    id: str
    problem_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    seed: int | None = None
    """Of the noise with which the answer was drawn; None for one that nobody drew."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_token_ids) + len(self.token_ids)


def read_texts(data: Path, max_length: int) -> list[Text]:
    """Reads the training data; answers are cut so that prompt and answer have at most max_length tokens.

    Answers with fewer than two tokens left are dropped: the first token is the target's own, so there is nothing to
    draft. Raises FourfoldError when no text is left.
    """
    read_manifest(data)
    texts = []
    rows = read_jsonl(data.parent / DATA_FILE)
    for row in rows:
        answer = row["token_ids"][: max(0, max_length - len(row["prompt_token_ids"]))]
        if len(answer) >= 2:
            texts.append(Text(row["id"], row["problem_id"], tuple(row["prompt_token_ids"]), tuple(answer), row["seed"]))
    if not texts:
        raise FourfoldError(
            f"{data}: of {len(rows)} texts none has two answer tokens within drafter.training.max_length={max_length}"
        )
    return texts


def hash_share(problem_id: str) -> float:
    """A number in [0, 1) that depends on the problem alone."""
    return int.from_bytes(hashlib.sha256(problem_id.encode()).digest()[:8]) / 2**64


def split_held_out(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Splits off the texts of about 8 % of the problems, by a hash of the problem: (trained on, held out).

    All answers to one problem fall on the same side. At least one problem is held out and one is trained on.
    Raises FourfoldError when the texts are of a single problem.
    """
    problems = sorted({text.problem_id for text in texts}, key=lambda name: (hash_share(name), name))
    if len(problems) < 2:
        raise FourfoldError(
            "the training data has answers to a single problem, but one must be held out; raise drafter.data.problems"
        )
    held_out = {name for name in problems[:-1] if hash_share(name) < HELD_OUT_SHARE} or {problems[0]}
    train = [text for text in texts if text.problem_id not in held_out]
    return train, [text for text in texts if text.problem_id in held_out]


def group_by_length(texts: Sequence[Text], size: int) -> list[list[Text]]:
    """Groups of `size` texts of similar length, each group to be one forward pass with little padding.

    Groups never change during training, only their order does: the target's hidden states of a text then have the same
    bits in every epoch and after a resume.
    """
    ordered = sorted(texts, key=lambda text: (text.length, text.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """Order of the groups in an epoch: a permutation that depends on seed and epoch alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    order: list[int] = torch.randperm(num_groups, generator=generator).tolist()
    return order
