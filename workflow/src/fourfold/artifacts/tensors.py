"""Reads safetensors headers without loading the tensors (format: https://github.com/huggingface/safetensors)."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → {dtype, shape, data_offsets} of each tensor in a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def bytes_by_dtype(paths: list[Path]) -> dict[str, int]:
    """Bytes of tensor data of each dtype (`BF16`, `F8_E4M3`, …), summed over files."""
    total: Counter[str] = Counter()
    for path in paths:
        for tensor in read_header(path).values():
            begin, end = tensor["data_offsets"]
            total[tensor["dtype"]] += end - begin
    return dict(sorted(total.items()))
