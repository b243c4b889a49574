"""What a verified tree leaves in the cache of a GPU: the kept path's keys and values, side by side after the root."""

import triton
import triton.language as tl
from torch import Tensor

from fourfold.modeling.launch import OPTIONS, let_next_start, wait_for_previous


@triton.jit
def _keep_path(
    cache: tl.tensor,
    starts: tl.tensor,
    nodes: tl.tensor,
    kept: tl.tensor,
    start_stride: tl.tensor,
    node_stride: tl.tensor,
    kept_stride: tl.tensor,
    layer_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    length: tl.constexpr,
    dim: tl.constexpr,
    DEPTHS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """The path of one sequence in one head of keys or values of one layer."""
    sequence, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    depth, column = tl.arange(0, DEPTHS), tl.arange(0, DIM)
    # A large cache has more elements than 32 bits count.
    rows = cache + layer.to(tl.int64) * layer_stride + sequence.to(tl.int64) * slot_stride + head * head_stride
    wait_for_previous()
    let_next_start()
    start = tl.load(starts + sequence * start_stride)
    node = tl.load(nodes + sequence * node_stride + depth, mask=depth < length, other=0)
    moved = (depth < length) & (depth <= tl.load(kept + sequence * kept_stride)) & (node != depth)
    there = moved[:, None] & (column < dim)[None, :]
    path = tl.load(rows + (start + node)[:, None] * dim + column[None, :], mask=there)
    # A place may be another's new one: all must have been read before any is written.
    tl.debug_barrier()
    tl.store(rows + (start + depth)[:, None] * dim + column[None, :], path, mask=there)


def keep_path(data: Tensor, starts: Tensor, nodes: Tensor, kept: Tensor) -> None:
    """Moves the keys and values of each sequence's kept nodes to where their positions are, in all layers.

    Args:
        data: of the cache, [layers, slots, 2 * kv_heads, length, head_dim], changed in place; the last two dimensions
            contiguous, the sequences' slots the first ones.
        starts: int64 [batch]: places of the roots. Node i lies at place start + i.
        nodes: int64 [batch, beam_length], rows contiguous: the node of each depth, that of depth 0 the root, 0.
        kept: int64 [batch]: depths below the root that are kept; what `nodes` has beyond does not matter.
    """
    (batch, length), dim = nodes.shape, data.shape[-1]
    _keep_path[(batch, data.shape[2], data.shape[0])](
        data,
        starts,
        nodes,
        kept,
        starts.stride(0),
        nodes.stride(0),
        kept.stride(0),
        data.stride(0),
        data.stride(1),
        data.stride(2),
        length=length,
        dim=dim,
        DEPTHS=triton.next_power_of_2(length),
        DIM=triton.next_power_of_2(dim),
        num_warps=1,
        **OPTIONS,
    )
