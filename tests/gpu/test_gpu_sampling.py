"""Tokens chosen by an NVIDIA GPU's kernels from logits of full size."""

import pytest
import torch

from fourfold.engine import SamplingParams
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.modeling.noise import gumbel, noise_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_token_has_the_highest_score_with_its_noise(spread: float, dtype: torch.dtype) -> None:
    """48 rows of 152,064 logits, flat and steep, against float64; greedy rows between sampled ones."""
    rows, vocab = 48, 152064
    generator = torch.Generator(CUDA).manual_seed(3)
    logits = (spread * torch.randn(rows, vocab, generator=generator, device=CUDA)).to(dtype)
    params = [SamplingParams(temperature=0.7 * min(1, row % 4), seed=row) for row in range(rows)]
    batch, index = SamplingBatch.of(params, CUDA), torch.arange(rows, device=CUDA)
    assert batch.in_kernels
    token = choose(logits, batch, index)[:, None]
    greedy = batch.temperature == 0
    assert torch.equal(token[greedy, 0], logits[greedy].argmax(-1))
    scores = logits[~greedy].double() / 0.7
    scores += gumbel(noise_keys(batch.seed, index)[~greedy, None], torch.arange(vocab, device=CUDA))
    assert (scores.gather(-1, token[~greedy])[:, 0] >= scores.amax(-1) - 1e-5).all()
