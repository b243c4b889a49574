"""The command lines of TensorRT-LLM: what builds an engine, and what serves it.

Flags and their meaning: `trtllm-build --help` and `trtllm-serve serve --help` of the releases in `config.trtllm`;
docs/tensorrt_llm.md says where each value comes from.
"""

from pathlib import Path

from fourfold.config.engine import EngineSettings
from fourfold.config.trtllm import TensorrtLlmSettings

BACKEND = {"1.1.0rc0": "trt", "1.1.0": "tensorrt", "1.2.1": "tensorrt"}
"""Release → what trtllm-serve calls the backend that runs engines; its default runs none."""


def image(version: str) -> str:
    """NVIDIA's container image of a release, as Snakemake and Apptainer name it."""
    return f"docker://nvcr.io/nvidia/tensorrt-llm/release:{version}"


def max_num_tokens(engine: EngineSettings, settings: TensorrtLlmSettings) -> int:
    """Tokens in one step of an engine."""
    return settings.max_num_tokens or engine.max_model_len


def build_command(
    engine: EngineSettings, settings: TensorrtLlmSettings, checkpoint: Path | str, output: Path | str
) -> list[str]:
    """`trtllm-build` for an engine's row.

    Args: directories of the checkpoint and of the engine. The number of GPUs is the checkpoint's.
    """
    drafts = engine.drafter == "redrafter"
    limits = {
        "--max_batch_size": engine.max_num_seqs,
        "--max_seq_len": engine.max_model_len,
        "--max_input_len": engine.max_model_len,
        "--max_num_tokens": max_num_tokens(engine, settings),
    }
    return [
        "trtllm-build",
        *("--checkpoint_dir", str(checkpoint)),
        *("--output_dir", str(output)),
        # As the recipe has it: with a drafter FP8 products by the plugin, else by TensorRT itself.
        *("--gemm_plugin", "fp8" if drafts and engine.precision == "fp8" else "auto"),
        *("--use_paged_context_fmha", "enable"),
        *(part for flag, value in limits.items() for part in (flag, str(value))),
        *(("--speculative_decoding_mode", "explicit_draft_tokens") if drafts else ()),
        # Beams of the answer, not of the drafter.
        *("--max_beam_width", "1"),
        *("--kv_cache_type", "paged"),
        # Else it lies in whatever folder the command runs in.
        *("--output_timing_cache", f"{output}/model.cache"),
    ]


def guard_arguments(engine: EngineSettings, settings: TensorrtLlmSettings) -> list[str]:
    """What `fourfold.trtllm.guard` is to check for an engine's row."""
    drafts = ["--redrafter"] if engine.drafter == "redrafter" else []
    return ["--version", settings.version, "--precision", engine.precision, *drafts]


def serve_command(
    engine: EngineSettings,
    settings: TensorrtLlmSettings,
    directory: Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> list[str]:
    """`trtllm-serve` for an engine's directory, in which the tokenizer lies too.

    The server's own limits default to more than a small engine holds, and then it does not start: they are given.
    """
    return [
        *("trtllm-serve", "serve", str(directory)),
        *("--tokenizer", str(directory)),
        *("--backend", BACKEND[settings.version]),
        *("--tp_size", str(engine.tensor_parallel_size)),
        *("--kv_cache_free_gpu_memory_fraction", str(settings.kv_cache_free_gpu_memory_fraction)),
        *("--max_batch_size", str(engine.max_num_seqs)),
        *("--max_num_tokens", str(max_num_tokens(engine, settings))),
        *("--host", host),
        *("--port", str(port)),
    ]
