"""TensorRT-LLM: the pinned release, and what all its engines share."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section

Version = Literal["1.1.0rc0", "1.1.0", "1.2.1"]


class TensorrtLlmSettings(Section):
    """How the engines of backend `tensorrt_llm` are built and served."""

    version: Version = "1.1.0rc0"
    """The release that builds and serves; another one that is found is refused. The recipe's is 1.1.0rc0. Releases
    after 1.3.0rc20 have no engine builder."""
    max_num_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one step of an engine; null means the engine's max_model_len, as in the recipe."""
    redrafter_greedy_search: bool = True
    """True: engines that draft verify greedily and ignore a request's temperature (the recipe's way); false: they
    sample."""
    kv_cache_free_gpu_memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the GPU memory that the weights leave free, which the server takes for its KV cache."""
