"""Random inputs of the GPU's kernels, on a GPU or for Triton's interpreter."""

import torch
from torch import Tensor

from fourfold.modeling.trunk_tree import PackedRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def chain(starts: list[int], tokens: int) -> Tensor:
    """Positions of new tokens that follow each other."""
    return torch.tensor(starts, device=DEVICE)[:, None] + torch.arange(tokens, device=DEVICE)


def random_trees(batch: int, nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any parents that come before their children: depths and masks, int64 [batch, nodes]."""
    generator = torch.Generator().manual_seed(seed)
    depths, masks = torch.zeros(2, batch, nodes, dtype=torch.int64)
    masks[:, 0] = 1
    row = torch.arange(batch)
    for node in range(1, nodes):
        parent = torch.randint(0, node, (batch,), generator=generator)
        depths[:, node], masks[:, node] = depths[row, parent] + 1, masks[row, parent] | 1 << node
    return depths.to(DEVICE), masks.to(DEVICE)


def packed_rows(sizes: list[int], nodes: int, seed: int) -> PackedRows:
    """The rows of trees of these sizes, in any order."""
    there = torch.arange(nodes) < torch.tensor(sizes)[:, None]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    rows = torch.full(there.shape, -1)
    rows[there] = order
    return PackedRows(rows.to(DEVICE), there.flatten().nonzero()[:, 0][order.argsort()].to(DEVICE))
