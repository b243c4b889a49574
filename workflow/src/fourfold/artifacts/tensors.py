"""Reads safetensors headers without loading the tensors (format: https://github.com/huggingface/safetensors)."""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → {dtype, shape, data_offsets} of each tensor in a safetensors file.

    Raises ValueError, without the file's name, when it is no such file or not a whole one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise ValueError(f"its {size} bytes do not hold a header")
        try:
            header = json.loads(file.read(length).decode())
            header.pop("__metadata__", None)
            tensors = [(info["dtype"], info["shape"], *info["data_offsets"]) for info in header.values()]
            valid = all(
                isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
                for dtype, shape, begin, end in tensors
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise ValueError("its header is not safetensors'")
    data = max((tensor[3] for tensor in tensors), default=0)
    if data != size - 8 - length:
        raise ValueError(f"it holds {size - 8 - length} bytes of tensors, {data} expected")
    return header


def bytes_by_dtype(paths: list[Path]) -> dict[str, int]:
    """Bytes of tensor data of each dtype (`BF16`, `F8_E4M3`, …), summed over files."""
    total: Counter[str] = Counter()
    for path in paths:
        for tensor in read_header(path).values():
            begin, end = tensor["data_offsets"]
            total[tensor["dtype"]] += end - begin
    return dict(sorted(total.items()))


def first_not_finite(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity; None if all are finite.

    Args: tensors by name, of any dtype. Weights are read once; nothing wider than they are is made of them.
    """
    import torch

    for name, tensor in tensors:
        if tensor.numel() == 0:
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            # This format has no infinity, and its NaN is all ones beside the sign.
            finite = int((tensor.view(torch.uint8) & 0x7F).max()) < 0x7F
        else:
            finite = all(math.isfinite(float(bound)) for bound in tensor.aminmax())
        if not finite:
            return name
    return None
