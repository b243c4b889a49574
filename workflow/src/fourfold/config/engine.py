"""Engine rows: a precision, a drafter or none, and a backend."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section
from fourfold.config.quantize import Precision

Auto = Literal["auto"]


class Numerics(Section):
    """What an engine's numbers are rounded to: beside the model, all that its text's distribution rests on."""

    precision: Precision
    """Checkpoint that the engine computes with."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`fp8` keeps keys and values as E4M3 without scales: half the bytes on a GPU, a little less exact. `auto`: as they
    are computed."""
    fp8_lm_head: bool = False
    """Also compute the output matrix in FP8, which quantisation leaves in bf16."""

    @property
    def numerics(self) -> str:
        """Name of this rounding: the precision, and what else is in FP8, such as `fp8-kv_cache-lm_head`."""
        parts = {"kv_cache_dtype": "kv_cache", "fp8_lm_head": "lm_head"}
        return "-".join([self.precision, *(parts[key] for key in self.fp8_keys if key in parts)])

    @property
    def fp8_keys(self) -> list[str]:
        """Keys of the row that ask for FP8, in their order."""
        asked = (self.precision == "fp8", self.kv_cache_dtype == "fp8", self.fp8_lm_head)
        return [key for key, fp8 in zip(("precision", "kv_cache_dtype", "fp8_lm_head"), asked, strict=True) if fp8]


class EngineSettings(Numerics):
    """One engine: a row of the benchmark."""

    drafter: Literal["none", "redrafter"] = "none"
    """Speculative decoding by the trained ReDrafter, or none."""
    backend: Literal["torch", "tensorrt_llm"] = "torch"
    """`torch`: the embedded engine; `tensorrt_llm`: NVIDIA TensorRT-LLM."""
    beam_width: Annotated[int, Field(ge=1)] | Auto = 1
    """With a drafter: continuations that are verified at once; those that begin alike share their tokens. `auto`
    measures what is fastest for each number of running sequences."""
    beam_length: Annotated[int, Field(ge=2)] | Auto = 4
    """With a drafter: tokens of a continuation, the last accepted one and the drafts (draft length + 1), or `auto`."""
    draft_min_p: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.0
    """With a drafter, on a CPU: drafts that it holds for less likely than this are not verified, or `auto`."""
    draft_tokens: Annotated[int, Field(ge=1)] | Auto | None = None
    """With a drafter: so many of the likeliest drafts are verified, `null` for all, or `auto`. On a GPU, sequences that
    run together share them: each has so many on the average, up to twice as many where the drafter is sure."""
    fp8_drafter: bool = True
    """On a GPU, in an engine of precision fp8: compute the drafter in FP8. Drafts change a little, tokens do not."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 16
    """Sequences that are decoded at once."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest sequence, prompt and answer, in tokens."""
    max_num_batched_tokens: Annotated[int, Field(ge=16)] = 512
    """Prompt tokens that are read between two decoding steps: how long a long prompt may hold up what runs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that may be in use, weights and all; the KV cache is planned within it."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share the model (`tensorrt_llm` only)."""

    @property
    def is_tuned(self) -> bool:
        """Whether something is left to be measured."""
        drafting = (self.beam_width, self.beam_length, self.draft_min_p, self.draft_tokens)
        return self.drafter != "none" and "auto" in drafting
