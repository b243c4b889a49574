"""Keeping drafts on a GPU: what follows a verification, in one launch.

The reference for which drafts are kept is `speculative.verify`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous

NONE = tl.constexpr(2**31 - 1)
"""Beyond all nodes."""


@triton.jit(do_not_specialize=["token_stride", "state_stride"], do_not_specialize_on_alignment=["state"])
def _keep(
    tokens: tl.tensor,
    chosen: tl.tensor,
    parents: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    state: tl.tensor,
    newest: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    state_stride: tl.tensor,
    nodes: tl.constexpr,
    length: tl.constexpr,
    width: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One sequence."""
    sequence, each, column = tl.program_id(0), tl.arange(0, NODES), tl.arange(0, BLOCK)
    there = each < nodes
    wait_for_previous()
    let_next_start()
    row = sequence * nodes + each
    if rows is not None:
        row = tl.load(rows + row, mask=there, other=-1).to(tl.int32)
        there = row >= 0
    token = tl.load(tokens + sequence * token_stride + each, mask=there, other=-2)
    choice = tl.load(chosen + row, mask=there, other=-1)
    parent = each - 1
    if parents is not None:
        parent = tl.load(parents + sequence * nodes + each, mask=there, other=-1).to(tl.int32)
    drafted = there & (each > 0)
    places = out + sequence * (3 * length + 3)
    node, kept, alive = 0, 0, 1
    tl.store(places, tl.load(tokens + sequence * token_stride))
    tl.store(places + length, 0)
    tl.store(places + 2 * length, tl.sum(tl.where(each == 0, row, 0)))
    for depth in tl.static_range(1, length):
        wanted = tl.sum(tl.where(each == node, choice, 0))
        child = tl.min(tl.where(drafted & (parent == node) & (token == wanted), each, NONE))
        alive = tl.where(child == NONE, 0, alive)
        node, kept = tl.where(alive > 0, child, node), kept + alive
        tl.store(places + depth, wanted)
        tl.store(places + length + depth, node)
        tl.store(places + 2 * length + depth, tl.sum(tl.where(each == node, row, 0)))
    following = tl.sum(tl.where(each == node, choice, 0))
    tl.store(places + 3 * length, tl.sum(drafted.to(tl.int32)))
    tl.store(places + 3 * length + 1, kept)
    tl.store(places + 3 * length + 2, following)
    state = state + sequence
    more = (kept + 1) * tl.load(state + 3 * state_stride)
    start, index = tl.load(state + state_stride), tl.load(state + 2 * state_stride)
    # A broken row goes on with some token until the host has seen it.
    tl.store(state, tl.maximum(following, 0))
    tl.store(state + state_stride, start + more)
    tl.store(state + 2 * state_stride, index + more)
    last = tl.sum(tl.where(each == node, row, 0))
    value = tl.load(hidden + last * width + column, mask=column < width)
    tl.store(newest + sequence * width + column, value, mask=column < width)


def keep_drafts(
    tokens: Tensor,
    chosen: Tensor,
    parents: Tensor | None,
    length: int,
    hidden: Tensor,
    state: Tensor,
    newest: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Keeps the drafts that were chosen, and prepares the next step.

    Args:
        tokens: int64 [batch, nodes], rows contiguous: the newest token, then drafts; parents come before children.
        chosen: int64 [rows], contiguous: what plain decoding chooses after each; -1 for a broken row.
        parents: int64 [batch, nodes], contiguous; None where each node follows the one before it.
        length: tokens from node 0 to the deepest node, both among them.
        hidden: [rows, hidden], contiguous, the target's state at each node.
        state: int64 [4, max_num_seqs]: newest tokens, their positions, numbers of generated tokens, and 1 for a
            sequence whose numbers grow, 0 for padding. The first three are brought up to date for the first rows.
        newest: [max_num_seqs, hidden], contiguous: given the state at the last node that is kept.
        rows: int64 [batch, nodes], contiguous: the row of each node, -1 for what is none; None: rows are batch * nodes
            in their order.
    Returns int64 [batch, 3 * length + 3]: tokens, nodes and rows of the path, of which the newest token and the drafts
    that are kept count; how many drafts there were, and how many are kept; and the token after them.
    """
    (batch, nodes), width = tokens.shape, hidden.shape[1]
    out = torch.empty(batch, 3 * length + 3, dtype=torch.int64, device=hidden.device)
    _keep[(batch,)](
        tokens,
        chosen,
        parents,
        rows,
        hidden,
        state,
        newest,
        out,
        tokens.stride(0),
        state.stride(0),
        nodes=nodes,
        length=length,
        width=width,
        NODES=triton.next_power_of_2(nodes),
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        **OPTIONS,
    )
    return out
