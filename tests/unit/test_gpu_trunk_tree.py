"""The drafter's trees on a GPU against their reference: on a GPU, or through Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from test_gpu_drafter import DEVICE, VOCAB, inputs, random_drafter

from fourfold.engine.trunk_tree import draft_trunk
from fourfold.modeling.draft_decode import DraftChain
from fourfold.modeling.draft_kernels import advance
from fourfold.modeling.noise import DraftNoise, gumbel, noise_keys
from fourfold.modeling.tree_kernels import make_tree
from fourfold.modeling.trunk_kernels import CANDIDATES, Candidates, Drafted, best_logits
from fourfold.modeling.trunk_tree import MAX_NODES, TrunkTree, pick_nodes

TOKENS = CANDIDATES + 88


def draft_noise(rows: int, weight: float = 0.7) -> DraftNoise:
    """Seeds of all 64 bits; every third request is greedy."""
    row = torch.arange(rows, device=DEVICE)
    return DraftNoise(row * 2**61 - 2**62, 1000 * row + 7, torch.where(row % 3 == 1, 0.0, weight))


def by_kernels(
    products: Tensor,
    width: int,
    nodes: int,
    noise: DraftNoise | None = None,
    names: Tensor | None = None,
    **shared: Any,
) -> TrunkTree:
    """A draft whose logits are given: products float32 [drafts, parts, rows, logits]; the newest token is 5."""
    drafts, _, rows, _ = products.shape
    drafted = Drafted.empty(rows, drafts, width, DEVICE)
    candidates = Candidates(torch.full((rows, 1), 5, device=DEVICE))
    state, table = torch.zeros(rows, 4, device=DEVICE), torch.zeros(2 * TOKENS, 4, device=DEVICE)
    for depth in range(drafts):
        advance(state, candidates, table, None, drafted, depth, rnn=False, fp8=False)
        candidates = best_logits(products[depth], names, width, noise, depth)
    return make_tree(candidates, drafted, nodes, **shared)


def by_reference(
    products: Tensor,
    width: int,
    nodes: int,
    noise: DraftNoise | None = None,
    names: Tensor | None = None,
    **shared: Any,
) -> TrunkTree:
    """The same of a drafter that has those logits."""
    drafts, _, rows, logits = products.shape
    given = iter(products.sum(1))
    drafter: Any = SimpleNamespace(
        config=SimpleNamespace(num_logits=logits),
        draft_to_target=names,
        advance=lambda state, token: state,
        logits=lambda hidden, state: next(given),
    )
    target: Any = SimpleNamespace(embed=lambda token: token)
    last, hidden = torch.full((rows,), 5, device=DEVICE), torch.zeros(rows, 4, device=DEVICE)
    return draft_trunk(drafter, target, hidden, last, drafts, width, nodes, noise, **shared)


def random_products(drafts: int, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(drafts)
    return (3 * torch.randn(drafts, 2, rows, TOKENS, generator=generator)).to(DEVICE)


def assert_same(got: TrunkTree, expected: TrunkTree) -> None:
    for name in ("tokens", "depths", "parents"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert (got.masks is None) == (expected.masks is None)
    if got.masks is not None and expected.masks is not None:
        assert torch.equal(got.masks, expected.masks)
    assert (got.packed is None) == (expected.packed is None)
    if got.packed is not None and expected.packed is not None:
        assert torch.equal(got.packed.rows, expected.packed.rows)
        assert torch.equal(got.packed.nodes, expected.packed.nodes)


def test_the_most_likely_nodes_are_picked() -> None:
    """By hand: a tree of four of six candidates, and one whose paths are all alike."""
    tokens = torch.tensor([[[10, 11], [20, 21], [30, 31]]] * 2)
    log_p = torch.tensor([[[-1.0, -3.0], [-2.0, -2.5], [-4.0, -5.0]], [[0.0, 0.0]] * 3])
    tree = pick_nodes(torch.tensor([7, 8]), tokens, log_p, 4)
    assert tree.tokens.tolist() == [[7, 10, 11, 20, 21], [8, 10, 11, 20, 21]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]] * 2
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1]] * 2
    assert tree.masks is not None
    assert tree.masks.tolist() == [[1, 0b11, 0b101, 0b1011, 0b10011]] * 2
    log_p[0, 2, 0] = -2.25
    tree = pick_nodes(torch.tensor([7, 8]), tokens, log_p, 4)
    assert tree.tokens[0].tolist() == [7, 10, 20, 21, 30]
    assert tree.parents[0].tolist() == [0, 0, 1, 1, 2]
    assert tree.masks is not None
    assert tree.masks[0].tolist() == [1, 0b11, 0b111, 0b1011, 0b10111]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("drafts", "width"), [(4, 1), (1, 4), (3, 2), (5, 2), (4, 4)])
def test_trees_of_every_size_are_those_of_the_reference(drafts: int, width: int, noisy: bool) -> None:
    products, noise = random_products(drafts), draft_noise(3) if noisy else None
    names = torch.randperm(2 * TOKENS, generator=torch.Generator().manual_seed(1))[:TOKENS].to(DEVICE)
    for nodes in range(1, drafts * width + 1) if width > 1 else [drafts]:
        draft_vocabulary = names if nodes % 2 else None
        got = by_kernels(products, width, nodes, noise, draft_vocabulary)
        assert got.tokens.shape == (3, 1 + nodes)
        assert_same(got, by_reference(products, width, nodes, noise, draft_vocabulary))


def test_the_largest_tree_uses_all_bits() -> None:
    products = random_products(16, rows=2)
    got = by_kernels(products, 4, MAX_NODES - 1)
    assert_same(got, by_reference(products, 4, MAX_NODES - 1))
    assert got.masks is not None
    assert got.masks.max() >= 1 << 62
    assert (got.masks > 0).all()


@pytest.mark.parametrize("spread", [0, 1, 300])
def test_equal_candidates_are_taken_in_order(spread: int) -> None:
    """Equal logits within a part and over parts; with a spread of 300 paths of probability 1 are as long as they go."""
    generator = torch.Generator().manual_seed(3)
    products = (spread * torch.randint(-2, 3, (3, 2, 2, TOKENS), generator=generator)).float().to(DEVICE)
    products[1:, 0, :, 37] += 2 * spread
    for width in (2, 4):
        for nodes in (1, 5, 3 * width):
            assert_same(by_kernels(products, width, nodes), by_reference(products, width, nodes))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("width", "nodes"), [(1, 3), (4, 5), (4, 12)])
def test_logits_that_are_no_numbers_still_give_trees_of_known_tokens(width: int, nodes: int) -> None:
    """The others' drafts are untouched."""
    products = random_products(3, rows=6)
    expected = by_reference(products[:, :, :1], width, nodes)
    products[1, 0, 1] = float("nan")
    products[:, 0, 2] = float("nan")
    products[1, 0, 3] = float("-inf")
    products[1, 0, 4, 7] = float("nan")
    products[1, 0, 5, 9] = float("inf")
    got = by_kernels(products, width, nodes)
    assert ((got.tokens >= 0) & (got.tokens < TOKENS)).all()
    assert (got.parents[:, 1:] < torch.arange(1, 1 + nodes, device=DEVICE)).all()
    assert (got.depths.gather(1, got.parents)[:, 1:] == got.depths[:, 1:] - 1).all()
    assert torch.equal(got.tokens[:1], expected.tokens)


def test_a_perfect_drafter_guesses_what_will_be_drawn() -> None:
    """Each depth's best candidate is what Gumbel-max draws there; greedy requests' is the likeliest token."""
    products = random_products(3, rows=12)
    noise = draft_noise(12, weight=1.0)
    for width in (1, 2):
        got = by_kernels(products, width, 3 * width, noise).tokens[:, 1::width]
        for depth in range(3):
            exact = products[depth].double().sum(0)
            drawn = gumbel(noise_keys(noise.seed, noise.index + depth)[:, None], torch.arange(TOKENS, device=DEVICE))
            expected = torch.where(noise.weight > 0, (exact + drawn).argmax(-1), exact.argmax(-1))
            assert torch.equal(got[:, depth], expected)
            assert not torch.equal(expected, exact.argmax(-1))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [{}, {"draft_vocab": 600}, {"rnn": False, "exit_dim": 64, "draft_vocab": 37}],
    ids=["plain", "draft vocabulary", "no network, projected"],
)
def test_the_network_s_trees_are_those_of_the_reference(shape: dict[str, Any], width: int, noisy: bool) -> None:
    drafter = random_drafter(**shape)
    embedding, hidden, last = inputs(5)
    target: Any = SimpleNamespace(embed=lambda token: embedding[token])
    noise = draft_noise(5) if noisy else None
    chain = DraftChain(drafter, embedding)
    for drafts, nodes in ((1, None), (4, 2 * width)):
        got = chain(hidden, last, drafts, width, nodes, noise)
        assert_same(got, draft_trunk(drafter, target, hidden, last, drafts, width, nodes, noise))
        assert got.tokens.max() < VOCAB


@pytest.mark.parametrize("running", [None, 4])
@pytest.mark.parametrize(
    ("drafts", "width", "nodes", "most"), [(1, 4, 1, 4), (3, 2, 2, 3), (4, 4, 3, 6), (5, 4, 4, 20)]
)
def test_trees_that_share_their_nodes_are_those_of_the_reference(
    drafts: int, width: int, nodes: int, most: int, running: int | None
) -> None:
    """Seven sequences, of which some only fill up the batch: their candidates come after all others'."""
    products = random_products(drafts, rows=7)
    products[:, :, 2] *= 4  # one whose drafter is sure of itself
    products[:, :, 5] = 0  # and one to which all tokens are alike
    runs = None if running is None else (torch.arange(7, device=DEVICE) < running).long()
    got = by_kernels(products, width, nodes, most=most, runs=runs)
    expected = by_reference(products, width, nodes, most=most, runs=runs)
    assert got.tokens.shape == (7, 1 + most)
    assert_same(got, expected)
    assert_packed(got, 7 * (1 + nodes))
    sizes = (got.packed.rows >= 0).sum(1) - 1
    assert sizes.sum() == 7 * nodes
    assert sizes[2] > sizes[5]
    if running is not None and running * most >= 7 * nodes:
        assert (sizes[running:] == 0).all()


def assert_packed(tree: TrunkTree, rows: int) -> None:
    """Each node has a row, and each row a node."""
    packed = tree.packed
    assert packed is not None
    assert packed.nodes.shape == (rows,)
    assert torch.equal(packed.rows.flatten()[packed.nodes], torch.arange(rows, device=DEVICE))
    assert (packed.rows >= 0).sum() == rows
    # Nodes of a sequence come one after the other, and what is above them among them.
    there = packed.rows >= 0
    assert (there[:, :-1] >= there[:, 1:]).all()
    assert there.gather(1, tree.parents).all()
    assert torch.equal(tree.row_tokens, tree.tokens.flatten()[packed.nodes])


def test_shared_nodes_go_to_the_likeliest_paths() -> None:
    """By hand: six drafts of two sequences, of which one may have four."""
    tokens = torch.tensor([[[10, 11], [20, 21], [30, 31]], [[40, 41], [50, 51], [60, 61]]])
    log_p = torch.tensor([[[-0.1, -4.0], [-0.2, -5.0], [-0.3, -6.0]], [[-1.0, -2.0], [-3.0, -3.5], [-7.0, -8.0]]])
    tree = pick_nodes(torch.tensor([7, 8]), tokens, log_p, 3, most=4)
    assert tree.tokens.tolist() == [[7, 10, 20, 30, 0], [8, 40, 41, 50, 0]]
    assert tree.depths.tolist() == [[0, 1, 2, 3, 0], [0, 1, 1, 2, 0]]
    assert tree.parents.tolist() == [[0, 0, 1, 2, 0], [0, 0, 0, 1, 0]]
    assert tree.masks is not None
    assert tree.masks.tolist() == [[1, 0b11, 0b111, 0b1111, 0], [1, 0b11, 0b101, 0b1011, 0]]
    assert tree.packed is not None
    assert tree.packed.rows.tolist() == [[0, 2, 3, 4, -1], [1, 5, 6, 7, -1]]
    assert tree.packed.nodes.tolist() == [0, 5, 1, 2, 3, 6, 7, 8]
    log_p[1] -= 20
    tree = pick_nodes(torch.tensor([7, 8]), tokens, log_p, 3, most=4)
    assert tree.packed is not None
    assert tree.packed.rows.tolist() == [[0, 2, 5, 3, 4], [1, 6, 7, -1, -1]], "one may not have all"
    tree = pick_nodes(torch.tensor([7, 8]), tokens, log_p, 3, most=4, runs=torch.tensor([0, 1]))
    assert (tree.packed.rows >= 0).sum(1).tolist() == [3, 5], "who does not run gets what is left"
