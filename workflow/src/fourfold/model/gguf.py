"""Reads GGUF files (format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3.

The gguf package's own reader wraps each of a tokenizer's hundred thousand strings in numpy arrays, which takes seconds;
this one unpacks them from the bytes. Dequantisation is the package's.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from fourfold.errors import FourfoldError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_OTHER_FILE = "choose a file of another quantisation, such as Q4_1, Q8_0 or BF16"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor's data is; `shape` is in row-major order, as in PyTorch."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


class GgufFile:
    """A GGUF file: `metadata` by key, `tensors` by name, and their values as float32.

    Raises FourfoldError when the file is no GGUF file, is cut, or holds a tensor that is quantised in an unknown way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except (
            struct.error,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            MemoryError,
            RecursionError,
        ) as error:
            # Whatever the broken bytes lead to: lengths beyond the file, kinds that do not exist, nesting without end.
            reason = " ".join(str(error).split())
            raise FourfoldError(f"{path.name}: not a whole GGUF file ({reason}); download it again") from None

    def _read_header(self) -> None:
        magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", self._bytes)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        self._at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: GgufTensor(shape, kind, start + offset) for name, shape, kind, offset in infos}
        for name, tensor in self.tensors.items():
            if tensor.offset + _byte_count(tensor) > len(self._bytes):
                raise ValueError(f"tensor {name} ends beyond the end of the file")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._at += length
        if self._at > len(self._bytes):
            raise ValueError("a string ends beyond the end of the file")
        return self._bytes[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element, count = self._scalar("I"), self._scalar("Q")
        if element in (_STRING, _ARRAY):
            return [self._value(element) for _ in range(count)]
        values = list(struct.unpack_from(f"<{count}{_SCALARS[element]}", self._bytes, self._at))
        self._at += struct.calcsize(f"<{count}{_SCALARS[element]}")
        return values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        # GGUF gives the fastest dimension first.
        shape = tuple(reversed([self._scalar("Q") for _ in range(self._scalar("I"))]))
        number = self._scalar("I")
        if number not in [kind.value for kind in GGMLQuantizationType]:
            raise FourfoldError(
                f"{self.path.name}: tensor {name} is of an unknown quantisation ({number}); {_OTHER_FILE}"
            )
        return name, shape, GGMLQuantizationType(number), self._scalar("Q")

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor's values, dequantised to float32, in row-major shape. Raises FourfoldError."""
        info = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, _byte_count(info), info.offset)
        try:
            values = dequantize(raw.reshape(*info.shape[:-1], -1), info.kind)
        except NotImplementedError:
            reason = f"tensor {name} is quantised as {info.kind.name}, which cannot be read here"
            raise FourfoldError(f"{self.path.name}: {reason}; {_OTHER_FILE}") from None
        return values.reshape(info.shape)


def _byte_count(tensor: GgufTensor) -> int:
    per_block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    count = 1
    for size in tensor.shape:
        count *= size
    if tensor.shape and tensor.shape[-1] % per_block:
        raise ValueError(f"{tensor.shape[-1]} values in a row are no whole blocks of {tensor.kind.name}")
    return count // per_block * block_bytes
