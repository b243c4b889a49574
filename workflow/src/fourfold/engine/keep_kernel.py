"""Keeping drafts on a GPU: what follows a verification of single beams, in one launch.

The reference for which drafts are kept is `speculative.verify`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous


@triton.jit
def _keep(
    tokens: tl.tensor,
    chosen: tl.tensor,
    sizes: tl.tensor,
    hidden: tl.tensor,
    state: tl.tensor,
    newest: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    size_stride: tl.tensor,
    state_stride: tl.tensor,
    nodes: tl.constexpr,
    width: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One sequence."""
    row, node, column = tl.program_id(0), tl.arange(0, NODES), tl.arange(0, BLOCK)
    there = node < nodes
    wait_for_previous()
    let_next_start()
    size = nodes - 1
    if sizes is not None:
        size = tl.load(sizes + row * size_stride).to(tl.int32)
    token = tl.load(tokens + row * token_stride + node, mask=there, other=-2)
    wanted = tl.load(chosen + row * nodes + node - 1, mask=there & (node > 0), other=-1)
    wrong = (node > 0) & ((node > size) | (token != wanted))
    kept = tl.min(tl.where(wrong, node, nodes)) - 1
    following = tl.load(chosen + row * nodes + kept)
    places = out + row * (nodes + 3)
    tl.store(places + node, token, mask=there)
    tl.store(places + nodes, kept)
    tl.store(places + nodes + 1, following)
    tl.store(places + nodes + 2, size)
    state = state + row
    more = (kept + 1) * tl.load(state + 3 * state_stride)
    start, index = tl.load(state + state_stride), tl.load(state + 2 * state_stride)
    # A broken row goes on with some token until the host has seen it.
    tl.store(state, tl.maximum(following, 0))
    tl.store(state + state_stride, start + more)
    tl.store(state + 2 * state_stride, index + more)
    value = tl.load(hidden + (row * nodes + kept) * width + column, mask=column < width)
    tl.store(newest + row * width + column, value, mask=column < width)


def keep_drafts(
    tokens: Tensor, chosen: Tensor, sizes: Tensor | None, hidden: Tensor, state: Tensor, newest: Tensor
) -> Tensor:
    """Keeps the drafts that were chosen, and prepares the next step.

    Args:
        tokens: int64 [batch, nodes], rows contiguous: the newest token, then drafts that follow each other.
        chosen: int64 [batch, nodes], contiguous: what plain decoding chooses after each; -1 for a broken row.
        sizes: int64 [batch], how many drafts there are; None: all of them.
        hidden: [batch, nodes, hidden], contiguous, the target's state at each node.
        state: int64 [4, max_num_seqs]: newest tokens, their positions, numbers of generated tokens, and 1 for a
            sequence whose numbers grow, 0 for padding. The first three are brought up to date for the first rows.
        newest: [max_num_seqs, hidden], contiguous: given the state at the last node that is kept.
    Returns int64 [batch, nodes + 3]: tokens, how many drafts are kept, the token after those, and sizes.
    """
    batch, nodes, width = hidden.shape
    out = torch.empty(batch, nodes + 3, dtype=torch.int64, device=hidden.device)
    _keep[(batch,)](
        tokens,
        chosen,
        sizes,
        hidden,
        state,
        newest,
        out,
        tokens.stride(0),
        0 if sizes is None else sizes.stride(0),
        state.stride(0),
        nodes=nodes,
        width=width,
        NODES=triton.next_power_of_2(nodes),
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        **OPTIONS,
    )
    return out
