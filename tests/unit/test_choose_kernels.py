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
from fourfold.engine.keep_kernel import keep_drafts
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.speculative import choose_everywhere
from fourfold.modeling.noise import gumbel, noise_keys

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
    got = choose_nodes(logits.flatten(0, 1), batch_of(params), index, depths)
    assert torch.equal(got.cpu(), reference(logits, params, index, depths).flatten())
    assert (got[3:6] == vocab - 3).all(), "the first of equal ones"
    alone = choose_nodes(logits[2], batch_of(params[2:3]), index[2:3], depths[2:3])
    assert torch.equal(alone, got[6:9]), "whatever else is in the batch"
    # Some of the nodes, in any order.
    places = torch.tensor([17, 4, 0, 9, 8, 15, 12, 6], device=DEVICE)
    some = logits.flatten(0, 1)[places]
    assert torch.equal(choose_nodes(some, batch_of(params), index, depths, places), got[places])
    assert torch.equal(choose_everywhere(some, depths, batch_of(params), index, places), got[places])


@pytest.mark.parametrize(("scale", "even"), [(1.0, 0.0), (2.0**20, 30.0)], ids=["scores alike", "large scores"])
def test_near_scores_are_compared_exactly(scale: float, even: float) -> None:
    """Nearer to each other than float32 tells them apart."""
    params, vocab = [SamplingParams(temperature=1 / scale, seed=i) for i in range(20)], 3000
    index = torch.arange(20)
    logits = torch.full((20, vocab), even)
    if not even:
        logits -= gumbel(noise_keys(torch.arange(20), index)[:, None], torch.arange(vocab)).float()
    expected = choose(logits, batch_of(params, CPU), index)
    assert torch.equal(choose_nodes(logits.to(DEVICE), batch_of(params), index.to(DEVICE)).cpu(), expected)
    assert expected.unique().numel() > 15


@pytest.mark.parametrize("temperature", [1e-5, 1e-37, 1e-38, 1e-44])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_all_numbers_give_a_token(temperature: float, sign: int) -> None:
    """What divides logits into infinities, or into nothing, must not lead out of the vocabulary."""
    logits = sign * (1 + torch.rand(4, 3000, generator=torch.Generator().manual_seed(3)).to(DEVICE))
    batch = batch_of([SamplingParams(temperature=temperature, seed=i, min_p=0.1 * (i % 2)) for i in range(4)])
    got = choose_nodes(logits, batch, torch.zeros(4, dtype=torch.int64, device=DEVICE))
    assert ((got >= 0) & (got < 3000)).all()
    if temperature == 1e-5:
        assert torch.equal(got, logits.argmax(-1))


def test_rows_of_a_captured_batch_say_themselves_whether_they_are_greedy() -> None:
    """There all rows count as sampled, at a temperature above 0."""
    logits = torch.randn(2, 1, 3000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    params, index = [SamplingParams(temperature=2.0, seed=5)] * 2, torch.zeros(2, dtype=torch.int64, device=DEVICE)
    batch = replace(batch_of(params), greedy=torch.tensor([True, False], device=DEVICE))
    drawn = reference(logits, params, index, index[:, None])
    got = choose_nodes(logits.flatten(0, 1), batch, index)
    assert got.tolist() == [int(logits[0].argmax()), int(drawn[1])]
    assert drawn[0] != got[0].cpu()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_give_no_token(broken: float, temperature: float) -> None:
    """On both paths alike, and in that row alone."""
    logits = torch.randn(2, 2, 4500, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    logits[1, 0, 4000] = broken
    params = [SamplingParams(temperature=temperature)] * 2
    index, depths = torch.tensor([3, 4], device=DEVICE), torch.tensor([[0, 1]] * 2, device=DEVICE)
    got = choose_nodes(logits.flatten(0, 1), batch_of(params), index, depths).cpu().view(2, 2)
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
    got = choose_nodes(logits.to(DEVICE).expand(250, -1), batch, index, depths)
    counts = torch.bincount(got.cpu(), minlength=16).double()
    assert chi_square_p_value(counts, torch.softmax(logits.double() / 0.7, 0)) > 1e-4
    assert chi_square_p_value(counts, torch.softmax(logits.double() / 1.1, 0)) < 1e-4


def walk(tokens: list[int], chosen: list[int], parents: list[int], length: int) -> list[int]:
    """The nodes that are kept, from node 0 on."""
    path = [0]
    while len(path) < length:
        node = path[-1]
        children = [i for i in range(1, len(tokens)) if parents[i] == node and tokens[i] == chosen[node]]
        if not children:
            break
        path.append(children[0])
    return path


@pytest.mark.parametrize("kind", ["chain", "tree", "trees of different sizes"])
def test_drafts_are_kept_as_long_as_they_are_what_is_chosen(kind: str) -> None:
    """None, some or all of a path right; in a tree two children of a node have different tokens."""
    generator = torch.Generator().manual_seed(6)
    batch, nodes, length = 120, 6, 6 if kind == "chain" else 4
    sizes = torch.randint(1, 7, (batch,), generator=generator) if "sizes" in kind else torch.full((batch,), nodes)
    tokens = torch.randint(0, 3, (batch, nodes), generator=generator)
    parents = torch.arange(-1, nodes - 1).clamp(min=0).expand(batch, -1).clone()
    if kind != "chain":
        # Node 1, 3 and 4 are a trunk; 2 and 5 leaves beside 1 and 4.
        parents[:] = torch.tensor([0, 0, 0, 1, 3, 3])
        tokens[:, 2], tokens[:, 5] = (tokens[:, 1] + 1) % 3, (tokens[:, 4] + 1) % 3
    chosen = torch.randint(0, 3, (batch, nodes), generator=generator)
    follows = torch.rand(batch, nodes, generator=generator) < 0.7
    for node in range(1, nodes):
        rows = torch.arange(batch)[follows[:, node]]
        chosen[rows, parents[rows, node]] = tokens[rows, node]
    index, start, active = torch.arange(batch) + 10, torch.arange(batch) + 20, (torch.arange(batch) != 5).long()
    hidden = torch.randn(batch, nodes, 6, generator=generator)
    state = torch.zeros(4, batch + 2, dtype=torch.int64)
    state[:, :batch] = torch.stack((tokens[:, 0], start, index, active))
    state, newest = state.to(DEVICE), torch.zeros(batch + 2, 6, device=DEVICE)
    given = None if kind == "chain" else parents.to(DEVICE)
    there = torch.arange(nodes) < sizes[:, None]
    # The rows of what is there, in any order.
    order = torch.randperm(int(there.sum()), generator=generator) if "sizes" in kind else torch.arange(batch * nodes)
    rows = torch.full((batch, nodes), -1)
    rows[there] = order
    by_row = order.argsort()
    got = keep_drafts(
        tokens.to(DEVICE),
        chosen[there][by_row].to(DEVICE),
        given,
        length,
        hidden[there][by_row].to(DEVICE),
        state,
        newest,
        rows.to(DEVICE) if "sizes" in kind else None,
    ).cpu()
    paths = [walk(*(x[i, : sizes[i]].tolist() for x in (tokens, chosen, parents)), length) for i in range(batch)]
    assert {len(path) for path in paths} >= {1, 2, 3, 4}
    for i, path in enumerate(paths):
        kept, following = len(path) - 1, int(chosen[i, path[-1]])
        assert got[i, : kept + 1].tolist() == tokens[i, path].tolist()
        assert got[i, length : length + kept + 1].tolist() == path
        assert got[i, 2 * length : 2 * length + kept + 1].tolist() == rows[i, path].tolist()
        assert got[i, -3:].tolist() == [sizes[i] - 1, kept, following]
        more = (kept + 1) * int(active[i])
        assert state[:, i].tolist() == [following, 20 + i + more, 10 + i + more, int(active[i])]
        assert torch.equal(newest[i].cpu(), hidden[i, path[-1]])
    assert not state[:, batch:].any()
    assert not newest[batch:].any()


def test_a_broken_row_keeps_what_came_before_and_goes_on() -> None:
    """The host is told -1; the next step must find a token that there is."""
    tokens, chosen = torch.tensor([[4, 5, 6]], device=DEVICE), torch.tensor([5, -1, 6], device=DEVICE)
    state = torch.tensor([[4], [7], [1], [1]], device=DEVICE)
    newest, hidden = torch.zeros(1, 2, device=DEVICE), torch.arange(6.0, device=DEVICE).view(3, 2)
    got = keep_drafts(tokens, chosen, None, 3, hidden, state, newest)
    assert got[0, :2].tolist() == [4, 5]
    assert got[0, -2:].tolist() == [1, -1]
    assert state.flatten().tolist() == [0, 9, 3, 1]
