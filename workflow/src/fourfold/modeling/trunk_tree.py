"""Trees of drafts that have one trunk: the drafter's likeliest chain, and beside it the next best tokens of each depth.

A drafter runs along the trunk alone, so a tree costs it no more than a chain. Of all candidates, those are verified
whose path is the most likely; they are leaves unless they are on the trunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 64
"""Nodes of a tree that is no chain, the root among them: each has a bit of a mask."""


@dataclass
class TrunkTree:
    """One tree a sequence, all of one size. Node 0 is the newest token; nodes are ordered by depth, then likeliness."""

    tokens: Tensor
    """int64 [batch, nodes]."""
    depths: Tensor
    """int64 [batch, nodes]: tokens between node 0 and the node."""
    parents: Tensor
    """int64 [batch, nodes]: 0 for node 0 itself."""
    masks: Tensor | None
    """int64 [batch, nodes]: bit j is set where node j is the node itself or above it, as the root always is. None
    for chains, where all nodes before a node are above it."""


def chain_tree(tokens: Tensor) -> TrunkTree:
    """Trees that are nothing but a trunk. tokens: int64 [batch, nodes], the newest ones first."""
    depths = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TrunkTree(tokens, depths, (depths - 1).clamp_(min=0), None)


def nodes_of(drafts: int, width: int, nodes: int | None) -> int:
    """How many drafts a tree has: of drafts * width candidates, those that are wanted; None wants all that can be."""
    most = drafts if width == 1 else min(drafts * width, MAX_NODES - 1)
    return most if nodes is None else min(nodes, most)


def pick_nodes(last: Tensor, tokens: Tensor, log_p: Tensor, nodes: int) -> TrunkTree:
    """Makes trees of the candidates whose paths are the most likely; of equal ones, of the first.

    A path is never likelier than a part of it: so all nodes above a chosen one are chosen too.

    Args:
        last: int64 [batch], the newest tokens.
        tokens: int64 [batch, depths, width], the best candidates of each depth, best first. The first is the trunk's.
        log_p: float32 of that shape: the logarithm of the probability of each candidate's path.
        nodes: how many are chosen, from 1 to depths * width.
    Returns trees of 1 + nodes nodes.
    """
    batch, _, width = tokens.shape
    order = log_p.flatten(1).sort(dim=-1, descending=True, stable=True).indices[:, :nodes].sort(-1).values
    root = order.new_zeros(batch, 1)
    depth = torch.cat((root, order // width + 1), 1)
    on_trunk = torch.cat((root == 0, order % width == 0), 1)
    above = on_trunk[:, None] & (depth[:, None] < depth[:, :, None])
    number = torch.arange(1 + nodes, device=last.device)
    masks = ((above | torch.eye(1 + nodes, dtype=torch.bool, device=last.device)).long() << number).sum(-1)
    parents = torch.where(above, number, 0).amax(-1)
    return TrunkTree(torch.cat((last[:, None], tokens.flatten(1).gather(1, order)), 1), depth, parents, masks)
