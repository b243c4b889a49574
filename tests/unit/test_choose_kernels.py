"""The kernels that choose and keep tokens against their references: on a GPU, or through Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_speculative import chi_square_p_value
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.engine import SamplingParams, choose_kernels
from fourfold.engine.choose_kernels import choose_nodes
from fourfold.engine.draft_tree import pack_beams, single_beam
from fourfold.engine.keep_kernel import keep_drafts
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.speculative import verify

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
CPU = torch.device("cpu")


def batch_of(params: list[SamplingParams], device: torch.device = DEVICE) -> SamplingBatch:
    return SamplingBatch.of(params, device)


def reference(logits: Tensor, params: list[SamplingParams], index: Tensor, depths: Tensor) -> Tensor:
    """Node by node, by PyTorch on the CPU."""
    batch, logits, index, depths = batch_of(params, CPU), logits.cpu(), index.cpu(), depths.cpu()
    return torch.stack([choose(logits[:, n], batch, index + depths[:, n]) for n in range(logits.shape[1])], 1)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("vocab", [7, 2048, 5000])
def test_tokens_are_those_of_the_reference(vocab: int, dtype: Any) -> None:
    """Greedy and sampled requests in one batch, with ties, seeds of all 64 bits and logits of probability 0."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(6, 3, vocab, generator=generator)).to(DEVICE, dtype)
    logits[:, :, vocab // 3] = float("-inf")
    logits[1, :, -3:] = 30.0
    kinds = [(0.0, 0.0), (0.0, 0.0), (0.7, 0.0), (1.0, 0.0), (1.5, 0.3), (0.2, 1.0)]
    params = [SamplingParams(temperature=t, min_p=p, seed=2**64 - 3 - 2**62 * i) for i, (t, p) in enumerate(kinds)]
    index, depths = torch.arange(6, device=DEVICE) * 1000, torch.tensor([0, 1, 1], device=DEVICE).expand(6, -1)
    got = choose_nodes(logits, batch_of(params), index, depths)
    assert torch.equal(got.cpu(), reference(logits, params, index, depths))
    assert (got[1] == vocab - 3).all(), "the first of equal ones"
    alone = choose_nodes(logits[2:3], batch_of(params[2:3]), index[2:3], depths[2:3])
    assert torch.equal(alone[0], got[2]), "whatever else is in the batch"


def test_rows_of_a_captured_batch_say_themselves_whether_they_are_greedy() -> None:
    """There all rows count as sampled, at a temperature above 0."""
    logits = torch.randn(2, 1, 3000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    params, index = [SamplingParams(temperature=2.0, seed=5)] * 2, torch.zeros(2, dtype=torch.int64, device=DEVICE)
    batch = replace(batch_of(params), greedy=torch.tensor([True, False], device=DEVICE))
    drawn = reference(logits, params, index, index[:, None])
    got = choose_nodes(logits, batch, index)
    assert got.flatten().tolist() == [int(logits[0].argmax()), int(drawn[1])]
    assert drawn[0] != got[0].cpu()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_give_no_token(broken: float, temperature: float) -> None:
    """On both paths alike, and in that row alone."""
    logits = torch.randn(2, 2, 4500, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    logits[1, 0, 4000] = broken
    params = [SamplingParams(temperature=temperature)] * 2
    index, depths = torch.tensor([3, 4], device=DEVICE), torch.tensor([[0, 1]] * 2, device=DEVICE)
    got = choose_nodes(logits, batch_of(params), index, depths).cpu()
    assert torch.equal(got, reference(logits, params, index, depths))
    infinite_greedy = broken == float("inf") and temperature == 0
    assert (got == -1).tolist() == [[False, False], [not infinite_greedy, False]]


def test_drawn_tokens_have_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several parts, with tokens of no weight; the test sees a temperature that is off."""
    monkeypatch.setattr(choose_kernels, "BLOCK", 8)
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(4))
    logits[[3, 8, 15]] = float("-inf")
    index, depths = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.arange(250, device=DEVICE)[None]
    batch = batch_of([SamplingParams(temperature=0.7, seed=7)])
    got = choose_nodes(logits.to(DEVICE).expand(1, 250, -1), batch, index, depths)
    counts = torch.bincount(got[0].cpu(), minlength=16).double()
    assert chi_square_p_value(counts, torch.softmax(logits.double() / 0.7, 0)) > 1e-4
    assert chi_square_p_value(counts, torch.softmax(logits.double() / 1.1, 0)) < 1e-4


@pytest.mark.parametrize("sized", [False, True])
def test_drafts_are_kept_as_the_verification_keeps_them(sized: bool) -> None:
    """None, some or all of the drafts right; trees of different sizes, whose fillers might be taken for right."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(8, 4, 3, generator=generator)
    last, drafts = torch.arange(8) % 3, logits[:, :3].argmax(-1)
    for row, wrong in enumerate([0, 1, 2, 0]):
        drafts[row, wrong] = (drafts[row, wrong] + 1) % 3
    logits[:, :, 0] += 0.01
    tree = single_beam(last, drafts)
    if sized:
        worth = (torch.arange(3) < (torch.arange(8) % 4)[:, None])[:, None]
        tree = pack_beams(last, drafts[:, None], worth)
    params = [SamplingParams()] * 8
    index, start, active = torch.arange(8) + 10, torch.arange(8) + 20, torch.ones(8, dtype=torch.int64)
    active[5] = 0
    node, following = verify(logits, tree, batch_of(params, CPU), index)
    hidden = torch.randn(8, 4, 6, generator=generator)
    kept = tree.depths[torch.arange(8), node]
    assert set(kept.tolist()) == {0, 1, 2, 3}

    state = torch.zeros(4, 10, dtype=torch.int64)
    state[:, :8] = torch.stack((last, start, index, active))
    state, newest = state.to(DEVICE), torch.zeros(10, 6, device=DEVICE)
    chosen, sizes = logits.argmax(-1).to(DEVICE), tree.sizes.to(DEVICE) if sized else None
    got = keep_drafts(tree.tokens.to(DEVICE), chosen, sizes, hidden.to(DEVICE), state, newest)
    assert torch.equal(got.cpu(), torch.cat((tree.tokens, torch.stack((kept, following, tree.sizes), 1)), 1))
    more = (kept + 1) * active
    assert torch.equal(state[:, :8].cpu(), torch.stack((following, start + more, index + more, active)))
    assert torch.equal(newest[:8].cpu(), hidden[torch.arange(8), node])
    assert not state[:, 8:].any()
    assert not newest[8:].any()


def test_a_broken_row_keeps_what_came_before_and_goes_on() -> None:
    """The host is told -1; the next step must find a token that there is."""
    tokens, chosen = torch.tensor([[4, 5, 6]], device=DEVICE), torch.tensor([[5, -1, 6]], device=DEVICE)
    state = torch.tensor([[4], [7], [1], [1]], device=DEVICE)
    newest, hidden = torch.zeros(1, 2, device=DEVICE), torch.arange(6.0, device=DEVICE).view(1, 3, 2)
    got = keep_drafts(tokens, chosen, None, hidden, state, newest)
    assert got.tolist() == [[4, 5, 6, 1, -1, 2]]
    assert state.flatten().tolist() == [0, 9, 3, 1]
