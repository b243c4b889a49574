"""Refuses to start what TensorRT-LLM or the GPU cannot do: `python -m fourfold.trtllm.guard --version V --precision P`.

It runs before `trtllm-build`, in TensorRT-LLM's container too, where nothing of this package's environment is: it needs
Python's own library alone.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from fourfold.errors import FourfoldError

INSTALL = "use its container (--sdm apptainer, docs/tensorrt_llm.md) or install it"
_LAST_BUILDER = (1, 3, 0, 20)
"""1.3.0rc20: the last release that builds engines."""


def check_version(wanted: str, program: str = "trtllm-build") -> None:
    """Raises FourfoldError unless TensorRT-LLM of that version is here, with its builder and the program."""
    try:
        found = metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        raise FourfoldError(f"TensorRT-LLM {wanted} is not installed here; {INSTALL}") from None
    if _order(found) > _LAST_BUILDER:
        raise FourfoldError(
            f"TensorRT-LLM {found} has no engine builder any more (1.3.0rc20 is the last that has); "
            f"use {wanted}: {INSTALL}"
        )
    if found != wanted:
        raise FourfoldError(
            f"TensorRT-LLM {found} is installed here, tensorrt_llm.version is {wanted}; {INSTALL}, or change the key"
        )
    if shutil.which(program) is None:
        raise FourfoldError(f"{program} is not on PATH, though TensorRT-LLM {found} is installed; {INSTALL} again")


def _order(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparing; a release comes after its candidates."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?", version)
    if match is None:
        raise FourfoldError(f"TensorRT-LLM {version}: not a version that is known here; {INSTALL}")
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch), 10**6 if candidate is None else int(candidate)


def check_gpu(precision: str, drafts: bool) -> None:
    """Raises FourfoldError when a GPU of this machine cannot run engines of that precision, or none is here."""
    asked = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    gpus = [(name.strip(), float(capability)) for name, capability in (line.rsplit(",", 1) for line in lines if line)]
    if not gpus:
        raise FourfoldError(
            "nvidia-smi names no GPU here, and trtllm-build needs one of the kind that will serve; build on such a "
            "machine, in a container with --apptainer-args=--nv"
        )
    for name, capability in gpus:
        if precision == "fp8" and capability < 8.9:
            needs = "8.9 or higher; use precision int8_wo or bf16"
        elif precision == "int8_wo" and 10 <= capability < 12:
            needs = "below 10.0 or from 12.0 on; use precision fp8 or bf16"
        elif drafts and capability < 8:
            needs = "8.0 or higher for a ReDrafter; use drafter none"
        else:
            continue
        raise FourfoldError(f"precision {precision}: {name} has compute capability {capability}, needed is {needs}")


def check_length(checkpoint: Path, max_seq_len: int) -> None:
    """Raises FourfoldError when sequences would be longer than the model was made for; TensorRT-LLM only warns."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if max_seq_len > config["max_position_embeddings"]:
        raise FourfoldError(
            f"max_model_len is {max_seq_len}, more than the {config['max_position_embeddings']} positions that the "
            "model was made for; lower it"
        )


def main() -> None:
    """Ends with one line on standard error and exit code 1 where something is refused."""
    parser = argparse.ArgumentParser(description="Checks TensorRT-LLM, the GPU and the checkpoint before a build.")
    parser.add_argument("--version", required=True)
    parser.add_argument("--precision", choices=("bf16", "fp8", "int8_wo"), required=True)
    parser.add_argument("--redrafter", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--max-seq-len", type=int, default=0)
    given = parser.parse_args()
    try:
        check_version(given.version)
        check_gpu(given.precision, given.redrafter)
        if given.checkpoint is not None:
            check_length(given.checkpoint, given.max_seq_len)
    except FourfoldError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
