"""The drafter's loss as CUDA graphs against the loss itself."""

import pytest
import torch
import torch.nn.functional as F

from fourfold.drafter.graphed_loss import GraphedLoss
from fourfold.drafter.loss import DraftLoss, make_teacher
from fourfold.drafter.metrics import DraftCounts
from fourfold.drafter.states import Batch
from fourfold.drafter.vocabulary import invert
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
VOCAB, HIDDEN, DRAFT_VOCAB = 512, 64, 128


def make_batch(lengths: list[int], seed: int) -> Batch:
    torch.manual_seed(seed)
    rows = sum(lengths)
    remaining = torch.cat([torch.arange(length - 1, -1, -1) for length in lengths])
    hidden = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    return Batch(hidden.cuda(), torch.randint(VOCAB, (rows,)).cuda(), remaining.cuda())


@pytest.mark.parametrize("distil", [False, True])
def test_captured_losses_count_and_differentiate_as_launched_ones_do(distil: bool) -> None:
    """Batches of two padded sizes by turns, their gradients added up; weights differ, and so do parameters."""
    torch.manual_seed(0)
    vocabulary = torch.randperm(VOCAB)[:DRAFT_VOCAB]
    config = RedrafterConfig(VOCAB, HIDDEN, 2 * HIDDEN, draft_vocab_size=DRAFT_VOCAB)
    drafter = Redrafter(config, vocabulary).cuda()
    embedding = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)
    teacher = make_teacher(torch.randn(DRAFT_VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)) if distil else None
    target_to_draft = invert(vocabulary, VOCAB).cuda()
    loss = DraftLoss(drafter, lambda tokens: F.embedding(tokens, embedding), target_to_draft, 3, teacher)
    graphed = GraphedLoss(loss)
    batches = [make_batch(lengths, seed).padded(64) for seed, lengths in enumerate(([30, 20], [50, 50], [3, 40]))]
    for parameter in drafter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for number in (0.5, 0.25, None, 0.1):
        weight = None if number is None else torch.full((), number, device="cuda")
        found = []
        for compute in (loss, graphed):
            counts = DraftCounts.zeros(3, "cuda")
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                for batch in batches:
                    counts.add(compute(batch, weight))
            found.append((counts.pack(), [p.grad.clone() for p in drafter.parameters()]))
            drafter.zero_grad(set_to_none=False)
        (expected, wanted), (counted, got) = found
        torch.testing.assert_close(counted, expected)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)
            assert a.any() == (weight is not None)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.mul_(0.9)
    assert len(graphed._captured) == 4
