"""Gumbel noise: a function of seed, index and token, with the distribution that makes the highest score a draw."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_speculative import chi_square_p_value

from fourfold.modeling.noise import DraftNoise, gumbel, noise_keys

INT64 = st.integers(-(2**63), 2**63 - 1)


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(INT64, INT64, st.integers(0, 2**31))
def test_noise_is_finite_and_depends_on_nothing_else(seed: int, index: int, token: int) -> None:
    """Alone, or beside others in any order."""
    keys = noise_keys(int64(seed), int64(index))
    one = gumbel(keys, int64(token))
    assert one.isfinite().all()
    many = gumbel(noise_keys(int64(3, seed), int64(index, index))[:, None], int64(token + 1, token, 0))
    assert many[1, 1] == one[0]


def test_noise_has_its_distribution() -> None:
    """Mean and deviation, and the shares below some quantiles; neighbours of seed, index and token are unrelated."""
    seed, index = torch.arange(50).repeat_interleave(40), torch.arange(40).repeat(50)
    noise = gumbel(noise_keys(seed, index)[:, None], torch.arange(500))
    assert math.isclose(noise.mean(), 0.5772157, abs_tol=0.005)
    assert math.isclose(noise.std(), math.pi / math.sqrt(6), abs_tol=0.005)
    for p in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert math.isclose(
            (noise < -math.log(-math.log(p))).double().mean(), p, abs_tol=6 * (p * (1 - p) / 1e6) ** 0.5
        )
    cube = noise.view(50, 40, 500)
    for a, b in ((cube[1:], cube[:-1]), (cube[:, 1:], cube[:, :-1]), (cube[..., 1:], cube[..., :-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.005


def test_the_highest_score_is_a_draw() -> None:
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = gumbel(noise_keys(int64(9), torch.arange(20_000))[:, None], torch.arange(12))
    counts = torch.bincount((logits + noise).argmax(-1), minlength=12).double()
    assert chi_square_p_value(counts, torch.softmax(logits, 0)) > 1e-4
    assert chi_square_p_value(counts, torch.softmax(logits / 1.2, 0)) < 1e-4


def test_a_drafter_that_knows_the_target_guesses_every_draw() -> None:
    """With all of the noise; with none of it, what is most likely."""
    logits = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    seed, index = torch.arange(300), torch.arange(300) * 7
    drawn = (logits + gumbel(noise_keys(seed, index + 2)[:, None], torch.arange(20))).argmax(-1)
    for weight, right in ((1.0, drawn), (0.0, logits.argmax(-1))):
        noise = DraftNoise(seed, index, torch.full((300,), weight))
        assert torch.equal(noise.add_to(logits, 2, torch.arange(20)).argmax(-1), right)
        beams = noise.add_to(logits[:, None].expand(-1, 3, -1), 2, torch.arange(20))
        assert torch.equal(beams.argmax(-1), right[:, None].expand(-1, 3))
