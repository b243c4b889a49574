"""Gumbel noise inside a GPU's kernels. The reference is `noise`."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

UNIT = tl.constexpr(2.0**-52)
SERIES = tl.constexpr(1 / 32)
"""Up to where three terms of a logarithm's series are off by less than a hundred thousandth."""
HAS_FAST_LOG = tl.constexpr(torch.cuda.is_available())
"""Triton's interpreter has not what a GPU has an instruction for."""


@triton.jit
def noise_key(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """`noise.noise_keys` of int64 seeds and indices: uint64."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    return _mix(state ^ _mix(index.to(tl.uint64, bitcast=True) + 0xD1B54A32D192ED03))


@triton.jit
def gumbel(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`noise.gumbel` of keys (uint64) and tokens (any integers): float64."""
    bits = _random(key, token) >> 12
    return -tl.log(-tl.log((bits.to(tl.int64).to(tl.float64) + 0.5) * UNIT))


@triton.jit
def rough_gumbel(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`gumbel` in float32, off by less than 1e-4; takes less than half the time."""
    random = _random(key, token).to(tl.int64, bitcast=True)
    # Of a number of 1/2 and more, what it lacks to 1 is converted: that has digits where the noise is largest.
    high = random < 0
    bits = tl.where(high, ~random, random) >> 12
    x = (bits.to(tl.float32) + 0.5) * UNIT
    series = x * (1 + x * (1 / 2 + x * (1 / 3)))
    return _minus_log(tl.where(high & (x < SERIES), series, _minus_log(tl.where(high, 1 - x, x))))


@triton.jit
def _minus_log(x: tl.tensor) -> tl.tensor:
    """The logarithm of float32 numbers with its sign turned, off by less than 1e-6."""
    return (libdevice.fast_log2f(x) if HAS_FAST_LOG else tl.log2(x)) * -0.6931471805599453


@triton.jit
def _random(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """64 random bits, uint64."""
    return _mix(key + token.to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
