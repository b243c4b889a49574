"""Engine rows: a precision, a drafter or none, and a backend."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section
from fourfold.config.quantize import Precision


class EngineSettings(Section):
    """One engine: a row of the benchmark."""

    precision: Precision
    """Checkpoint that the engine computes with."""
    drafter: Literal["none", "redrafter"] = "none"
    """Speculative decoding by the trained ReDrafter, or none."""
    backend: Literal["torch", "tensorrt_llm"] = "torch"
    """`torch`: the embedded engine; `tensorrt_llm`: NVIDIA TensorRT-LLM."""
    beam_width: Annotated[int, Field(ge=1)] = 1
    """With a drafter: continuations that are drafted and verified at once; those that begin alike share their tokens."""
    beam_length: Annotated[int, Field(ge=2)] = 4
    """With a drafter: tokens verified at once, the last accepted one and the drafts (draft length + 1)."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 16
    """Sequences that are decoded at once."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest sequence, prompt and answer, in tokens."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share the model (`tensorrt_llm` only)."""
