"""The kernels' Gumbel noise against its reference: on a GPU, or through Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
import triton.language as tl  # noqa: E402  # where it is installed

from fourfold.modeling import noise, noise_kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS = 52


@triton.jit
def _both(keys: tl.tensor, tokens: tl.tensor, exact: tl.tensor, rough: tl.tensor, BLOCK: tl.constexpr) -> None:
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, token = tl.load(keys + place).to(tl.uint64, bitcast=True), tl.load(tokens + place)
    tl.store(exact + place, noise_kernels.gumbel(key, token))
    tl.store(rough + place, noise_kernels.rough_gumbel(key, token))


def keys_of(bits: list[int]) -> list[int]:
    """Keys with which token 0 gets these random bits: splitmix64 undone."""
    found = []
    for wanted in bits:
        x = wanted << (64 - BITS)
        for shift, factor in ((31, 1), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
            x = x * pow(factor, -1, 2**64) % 2**64
            x ^= (x >> shift) ^ (x >> 2 * shift)
        found.append(noise.signed(x))
    return found


def test_noise_of_both_kinds_is_the_references() -> None:
    """With the smallest and largest random numbers, and where the rough one passes from one form to the other."""
    eighths = [i * 2 ** (BITS - 3) + j for i in range(1, 8) for j in (-(2**28), -1, 0, 1, 2**28)]
    ends = [2**i + j for i in range(BITS) for j in (-1, 0)]
    chosen = [*eighths, *ends, *(2**BITS - 1 - bits for bits in ends)]
    generator = torch.Generator().manual_seed(0)
    count = 2**16
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    tokens = torch.randint(0, 2**31, (count,), generator=generator)
    keys[: len(chosen)], tokens[: len(chosen)] = torch.tensor(keys_of(chosen)), 0
    exact = torch.empty(count, dtype=torch.float64, device=DEVICE)
    rough = torch.empty(count, dtype=torch.float32, device=DEVICE)
    _both[(count // 1024,)](keys.to(DEVICE), tokens.to(DEVICE), exact, rough, BLOCK=1024)
    expected = noise.gumbel(keys, tokens)
    assert expected.min() < -3.5
    assert expected.max() > 36
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-12, atol=1e-12)
    assert (rough.cpu() - expected).abs().max() < 1e-4
