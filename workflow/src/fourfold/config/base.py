"""What every section of the configuration shares: unknown keys and wrong types are errors."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that every generator of random numbers takes."""


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
