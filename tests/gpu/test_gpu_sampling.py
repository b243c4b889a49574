"""Tokens chosen by an NVIDIA GPU's kernels from logits of full size."""

import pytest
import torch

from fourfold.engine import SamplingParams
from fourfold.engine.sampling import SamplingBatch, choose, uniforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_token_is_where_the_distribution_function_reaches_its_number(spread: float, dtype: torch.dtype) -> None:
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
    p = torch.softmax(logits[~greedy].double() / 0.7, -1)
    end = p.cumsum(-1).gather(-1, token[~greedy])[:, 0]
    begin = end - p.gather(-1, token[~greedy])[:, 0]
    number = uniforms(batch.seed, index)[~greedy]
    assert (begin - 2e-6 <= number).all()
    assert (number <= end + 2e-6).all()
