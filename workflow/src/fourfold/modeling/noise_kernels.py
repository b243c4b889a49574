"""Gumbel noise inside a GPU's kernels. The reference is `noise`."""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-52)


@triton.jit
def noise_key(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """`noise.noise_keys` of int64 seeds and indices: uint64."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    return _mix(state ^ _mix(index.to(tl.uint64, bitcast=True) + 0xD1B54A32D192ED03))


@triton.jit
def gumbel(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`noise.gumbel` of keys (uint64) and tokens (any integers): float64."""
    bits = _mix(key + token.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 12
    return -tl.log(-tl.log((bits.to(tl.int64).to(tl.float64) + 0.5) * UNIT))


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
