"""Making trees of drafts on a GPU: of the best tokens of each depth, those whose paths are the most likely.

The reference is `trunk_tree.pick_nodes`. A sequence's tree is made in one launch; trees that share their nodes take one
more, since a sequence has to know what the others' candidates are worth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous
from fourfold.modeling.trunk_kernels import Candidates, Drafted, choose
from fourfold.modeling.trunk_tree import PackedRows, TrunkTree, chain_tree

BLOCK = 128
"""Candidates of all sequences that a program compares its own with at once."""
CLASS = tl.constexpr(1 << 46)
"""What tells the candidates that count more from those that count less, whatever their probability."""
INDEX = tl.constexpr(1 << 14)
"""More than there are candidates."""


@triton.jit(do_not_specialize_on_alignment=["runs"])
def _make_tree(
    tokens: tl.tensor,
    scores: tl.tensor,
    masses: tl.tensor,
    drafted: tl.tensor,
    log_p: tl.tensor,
    tree: tl.tensor,
    worth: tl.tensor,
    runs: tl.tensor,
    count: tl.tensor,
    steps: tl.tensor,
    nodes: tl.tensor,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """The best tokens of the last depth, and the tree of one sequence, or what its candidates are worth."""
    row, at = tl.program_id(0), tl.arange(0, SIZE)
    wait_for_previous()
    let_next_start()
    choose(tokens, scores, masses, drafted, log_p, count, steps - 1, steps, WIDTH, COUNT)
    if log_p is not None:
        # Threads read below what others have just stored.
        tl.debug_barrier()
        candidates = (steps - 1) * WIDTH
        there = at < candidates
        path = tl.load(log_p + (row * steps + 1) * WIDTH + at, mask=there, other=float("-inf"))
        here, other = at[:, None], at[None, :]
        better = (path[None, :] > path[:, None]) | ((path[None, :] == path[:, None]) & (other < here))
        before = tl.sum(better.to(tl.int32), 1)
        if worth is None:
            _store_tree(drafted, tree, there & (before < nodes - 1), at, None, steps, nodes, WIDTH, SIZE)
        else:
            # The bits of a number that is not positive, without its sign, grow as it falls.
            magnitude = (path + 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            kind = (before < nodes - 1).to(tl.int64)
            if runs is not None:
                kind *= tl.where(tl.load(runs + row) != 0, 2, 1)
            index = row * candidates + at
            tl.store(worth + index, kind * CLASS - magnitude.to(tl.int64) * INDEX - index, mask=there)


@triton.jit
def _pack_trees(
    drafted: tl.tensor,
    worth: tl.tensor,
    tree: tl.tensor,
    rows: tl.tensor,
    nodes_at: tl.tensor,
    total: tl.tensor,
    steps: tl.tensor,
    nodes: tl.tensor,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The tree of one sequence, of the `total` drafts that are worth the most in all of them."""
    row, at, each = tl.program_id(0), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    batch, candidates = tl.num_programs(0), (steps - 1) * WIDTH
    there = at < candidates
    wait_for_previous()
    let_next_start()
    # Less than anything is worth, for what is not there.
    own = tl.load(worth + row * candidates + at, mask=there, other=-CLASS)
    rank = tl.zeros([SIZE], tl.int32)
    for start in range(0, batch * candidates, BLOCK):
        others = tl.load(worth + start + each, mask=start + each < batch * candidates, other=-CLASS)
        rank += tl.sum((others[None, :] > own[:, None]).to(tl.int32), 1)
    kept = there & (rank < total)
    node = tl.cumsum(kept.to(tl.int32), 0)
    size = tl.max(node)
    fill = tl.arange(0, NODES)
    behind, place = (fill > size) & (fill < nodes), row * nodes + fill
    tl.store(rows + place, tl.full([NODES], -1, tl.int64), mask=behind)
    for plane in tl.static_range(4):
        tl.store(tree + plane * batch * nodes + place, tl.zeros([NODES], tl.int64), mask=behind)
    # The roots have the first rows.
    tl.store(rows + row * nodes, row)
    tl.store(nodes_at + row, row * nodes)
    tl.store(rows + row * nodes + node, batch + rank, mask=kept)
    tl.store(nodes_at + batch + rank, row * nodes + node, mask=kept)
    _store_tree(drafted, tree, kept, at, node, steps, nodes, WIDTH, SIZE)


@triton.jit
def _store_tree(
    drafted: tl.tensor,
    tree: tl.tensor,
    kept: tl.tensor,
    at: tl.tensor,
    node: tl.tensor,
    steps: tl.tensor,
    nodes: tl.tensor,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Stores a program's tree: tokens, depths, parents and masks of its root and of the candidates that are kept."""
    row = tl.program_id(0)
    start, here, other = row * steps * WIDTH, at[:, None], at[None, :]
    if node is None:
        node = tl.cumsum(kept.to(tl.int32), 0)
    # All above a node that is kept are kept, and have a number; for other candidates the rest is of no account.
    trunk = (other % WIDTH == 0) & (other // WIDTH < here // WIDTH)
    parent = tl.sum(tl.where(trunk & (other // WIDTH == here // WIDTH - 1), node[None, :], 0), 1)
    bit = tl.full((SIZE,), 1, tl.int64) << node
    mask = tl.sum(tl.where(trunk, bit[None, :], 0), 1) + bit + 1
    token = tl.load(drafted + start + WIDTH + at, mask=kept, other=0)
    tree, plane = tree + row * nodes, tl.num_programs(0) * nodes
    tl.store(tree, tl.load(drafted + start))
    tl.store(tree + plane, 0)
    tl.store(tree + 2 * plane, 0)
    tl.store(tree + 3 * plane, 1)
    tl.store(tree + node, token, mask=kept)
    tl.store(tree + plane + node, at // WIDTH + 1, mask=kept)
    tl.store(tree + 2 * plane + node, parent, mask=kept)
    tl.store(tree + 3 * plane + node, mask, mask=kept)


def make_tree(
    candidates: Candidates, drafted: Drafted, nodes: int, most: int | None = None, runs: Tensor | None = None
) -> TrunkTree:
    """Chooses the last tokens of a draft, and its tree.

    Args:
        candidates: those of the last depth.
        drafted: what was chosen at the depths before, drafts * width being 64 at most; given the last depth's too.
        nodes: how many of them a tree has besides its root: all of a chain, MAX_NODES - 1 at most of others.
        most: for trees that share them (`pick_nodes`): how many one may have, MAX_NODES - 1 at most.
        runs: int64 [rows], contiguous: 0 for rows that get only what the others may not have.
    """
    rows, steps, width = drafted.tokens.shape
    device, count = drafted.tokens.device, candidates.tokens.shape[1]
    tree = worth = packed = None
    largest = 1 + (nodes if most is None else most)
    sizes = {"WIDTH": width, "SIZE": triton.next_power_of_2((steps - 1) * width)}
    if drafted.log_p is not None:
        tree = torch.empty(4, rows, largest, dtype=torch.int64, device=device)
        if most is not None:
            worth = torch.empty(rows, (steps - 1) * width, dtype=torch.int64, device=device)
            assert worth.numel() < INDEX.value, "more candidates than their worth tells apart"
    _make_tree[(rows,)](
        candidates.tokens,
        candidates.scores,
        candidates.masses,
        drafted.tokens,
        drafted.log_p,
        tree,
        worth,
        runs,
        count,
        steps,
        largest,
        COUNT=triton.next_power_of_2(count),
        **sizes,
        num_warps=1 if tree is None else 4,
        **OPTIONS,
    )
    if tree is None:
        return chain_tree(drafted.tokens[:, :, 0])
    if worth is not None:
        packed = PackedRows(
            torch.empty(rows, largest, dtype=torch.int64, device=device),
            torch.empty(rows * (1 + nodes), dtype=torch.int64, device=device),
        )
        _pack_trees[(rows,)](
            drafted.tokens,
            worth,
            tree,
            packed.rows,
            packed.nodes,
            rows * nodes,
            steps,
            largest,
            **sizes,
            NODES=triton.next_power_of_2(largest),
            BLOCK=BLOCK,
            num_warps=4,
            **OPTIONS,
        )
    return TrunkTree(tree[0], tree[1], tree[2], tree[3], packed)
