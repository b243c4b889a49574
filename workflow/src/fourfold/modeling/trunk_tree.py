"""Trees of drafts that have one trunk: the drafter's likeliest chain, and beside it the next best tokens of each depth.

A drafter runs along the trunk alone, so a tree costs it no more than a chain. Of all candidates, those are verified
whose path is the most likely; they are leaves unless they are on the trunk. Sequences that run together share what is
verified: where the drafter is sure of itself a draft is long, and where it is not it is short.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 63
"""Nodes of a tree that is no chain, the root among them: each has a bit of a mask, whose sign is none."""


@dataclass
class PackedRows:
    """Which rows of a step's products are which nodes, where sequences have different numbers of them."""

    rows: Tensor
    """int64 [batch, nodes]: the row of each node; -1 behind the last one of a sequence."""
    nodes: Tensor
    """int64 [rows], its inverse: the place of each row's node in `rows`, flattened."""


@dataclass
class TrunkTree:
    """One tree a sequence. Node 0 is the newest token; nodes are ordered by depth, then likeliness.

    Trees that share their nodes (`packed`) have different sizes; what fills up a small one is 0.
    """

    tokens: Tensor
    """int64 [batch, nodes]."""
    depths: Tensor
    """int64 [batch, nodes]: tokens between node 0 and the node."""
    parents: Tensor
    """int64 [batch, nodes]: 0 for node 0 itself."""
    masks: Tensor | None
    """int64 [batch, nodes]: bit j is set where node j is the node itself or above it, as the root always is. None
    for chains, where all nodes before a node are above it."""
    packed: PackedRows | None = None
    """Where the nodes are; None where all trees are of one size, and a node's row is its place."""

    @property
    def sizes(self) -> Tensor:
        """How many nodes are drafts: int64 [batch]."""
        if self.packed is None:
            return torch.full_like(self.tokens[:, 0], self.tokens.shape[1] - 1)
        return (self.packed.rows >= 0).sum(1) - 1

    @property
    def row_tokens(self) -> Tensor:
        """The tokens of the step's rows: int64 [rows]."""
        return self.tokens.flatten() if self.packed is None else self.tokens.flatten()[self.packed.nodes]


def chain_tree(tokens: Tensor) -> TrunkTree:
    """Trees that are nothing but a trunk. tokens: int64 [batch, nodes], the newest ones first."""
    depths = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TrunkTree(tokens, depths, (depths - 1).clamp_(min=0), None)


def nodes_of(drafts: int, width: int, nodes: int | None) -> int:
    """How many drafts a tree has: of drafts * width candidates, those that are wanted; None wants all that can be."""
    most = drafts if width == 1 else min(drafts * width, MAX_NODES - 1)
    return most if nodes is None else min(nodes, most)


def pick_nodes(
    last: Tensor, tokens: Tensor, log_p: Tensor, nodes: int, most: int | None = None, runs: Tensor | None = None
) -> TrunkTree:
    """Makes trees of the candidates whose paths are the most likely; of equal ones, of the first.

    A path is never likelier than a part of it: so all nodes above a chosen one are chosen too.

    Args:
        last: int64 [batch], the newest tokens.
        tokens: int64 [batch, depths, width], the best candidates of each depth, best first. The first is the trunk's.
        log_p: float32 of that shape: the logarithm of the probability of each candidate's path.
        nodes: how many are chosen, from 1 to depths * width, of each sequence.
        most: instead, `nodes` a sequence on the average: the likeliest of all sequences, though no more than `most` of
            one.
        runs: int64 [batch], 0 for sequences that get only what the others may not have; None: there are none.
    """
    batch, depths, width = tokens.shape
    place = torch.arange(depths * width, device=last.device).expand(batch, -1)
    # How many of a sequence's own come before each.
    order = log_p.flatten(1).sort(dim=-1, descending=True, stable=True).indices
    before = torch.empty_like(order).scatter_(1, order, place)
    rank = None if most is None else _rank_all(log_p.flatten(1), before < most, runs)
    chosen = before < nodes if rank is None else rank < batch * nodes
    number = chosen.cumsum(1) * chosen
    count = 1 + (nodes if most is None else most)
    trees = torch.zeros(4, batch, count, dtype=torch.int64, device=last.device)
    depth, on_trunk = place // width + 1, place % width == 0
    above = chosen[:, None] & on_trunk[:, None] & (place[:, None] // width < (place // width)[:, :, None])
    bits = torch.where(above, torch.ones_like(number)[:, None] << number[:, None], 0).sum(-1)
    masks = 1 + bits + (torch.ones_like(number) << number)
    parents = torch.where(above, number[:, None], 0).amax(-1)
    trees.scatter_(2, number.expand(4, -1, -1), torch.stack((tokens.flatten(1), depth, parents, masks)))
    trees[:, :, 0] = 0  # what was not chosen went here
    trees[0, :, 0], trees[3, :, 0] = last, 1
    packed = None if rank is None else _pack(number, rank, count, batch * (1 + nodes))
    return TrunkTree(trees[0], trees[1], trees[2], trees[3], packed)


def _rank_all(log_p: Tensor, allowed: Tensor, runs: Tensor | None) -> Tensor:
    """How many candidates of all sequences come before each: int64 [batch, candidates].

    Args: log_p of that shape; bool of that shape, which a sequence may have; `pick_nodes`'s runs.
    """
    kind = allowed.long() * (1 if runs is None else 1 + (runs[:, None] != 0))
    # Sorted by what counts less first: the sorts are stable.
    order = log_p.flatten().sort(descending=True, stable=True).indices
    order = order[kind.flatten()[order].sort(descending=True, stable=True).indices]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(log_p)


def _pack(number: Tensor, rank: Tensor, nodes: int, rows: int) -> PackedRows:
    """The roots have the first rows, and the drafts follow by likeliness.

    Args: int64 [batch, candidates], each one's number in its tree, 0 for none, and its rank among all; nodes of a tree;
        rows there are.
    """
    batch, device = len(number), number.device
    row_of = torch.full((batch, nodes), -1, dtype=torch.int64, device=device)
    row_of.scatter_(1, number, batch + rank)
    row_of[:, 0] = torch.arange(batch, device=device)
    # What has no row goes to one beyond all.
    places = torch.where(row_of < 0, rows, row_of).flatten()
    node_of = number.new_empty(rows + 1).scatter_(0, places, torch.arange(batch * nodes, device=device))
    return PackedRows(row_of, node_of[:rows])
