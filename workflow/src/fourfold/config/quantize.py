"""Calibration data and the quantised checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section

Precision = Literal["bf16", "fp8", "int8_wo"]


class CalibrationSettings(Section):
    """The texts whose activations set the FP8 scales."""

    samples: Annotated[int, Field(ge=1)] = 64
    """How many calibration problems to use."""


class QuantizeSettings(Section):
    """Post-training quantisation by NVIDIA ModelOpt."""

    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of each calibration text that are used; longer ones are cut."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Calibration texts in one forward pass."""


class FidelitySettings(Section):
    """How far an engine's logits are from the model's, on benchmark problems with the dataset's solutions.

    None of these problems calibrates or trains anything.
    """

    problems: Annotated[int, Field(ge=2)] = 8
    """How many benchmark problems to compare on."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens of each solution that are compared; longer ones are cut."""
