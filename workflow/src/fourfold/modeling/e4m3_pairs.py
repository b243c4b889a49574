"""E4M3 values on a GPU, read two at a time.

Tensor cores take a matrix whose rows lie across the memory only of 16-bit numbers in one load: of bytes, each has to be
fetched by itself. Two neighbours together are such a number. They are taken apart in registers, and give the columns of
even and of odd number as two matrices.
"""

import torch
import triton
import triton.language as tl

CONVERTS = tl.constexpr(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
"""Whether the GPU converts two E4M3 values at once."""
# The bytes of two pairs that belong together come first, in a register of four; then both are converted.
_CONVERT = """{{
.reg .b32 t;
.reg .b16 low, high;
prmt.b32 t, $1, 0, {};
mov.b32 {{low, high}}, t;
cvt.rn.f16x2.e4m3x2 $0, low;
}}"""
FIRST, SECOND = tl.constexpr(_CONVERT.format("0x4420")), tl.constexpr(_CONVERT.format("0x4431"))


@triton.jit
def unpack(pairs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second E4M3 value of each int16, in float16, which has them all."""
    if CONVERTS:
        first = tl.inline_asm_elementwise(FIRST, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
        second = tl.inline_asm_elementwise(SECOND, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    else:
        first = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return first, second
