"""Candidates of a draft, packed into a prefix tree: beams that begin alike share their nodes and are verified once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.modeling.beams import Beams


@dataclass
class DraftTree:
    """One tree a sequence. Node 0 is the newest token; parents come before children.

    Trees have different sizes; the nodes that fill up a small one have depth 0 and are nobody's children.
    """

    tokens: Tensor
    """int64 [batch, nodes]."""
    depths: Tensor
    """int64 [batch, nodes]: tokens between node 0 and the node."""
    parents: Tensor
    """int64 [batch, nodes]."""
    paths: Tensor
    """int64 [batch, beam_width, beam_length]: the nodes of each beam, node 0 among them."""
    sizes: Tensor
    """int64 [batch]: nodes that are drafts."""

    @property
    def beams(self) -> Beams | None:
        """The beams, for the target's forward; None for a single one, whose nodes simply follow each other."""
        return Beams(self.paths, self.tokens.shape[1]) if self.paths.shape[1] > 1 else None

    @property
    def beam_length(self) -> int:
        """Tokens of each beam, the newest token among them."""
        return self.paths.shape[2]

    def child(self, nodes: Tensor, depth: int, tokens: Tensor) -> Tensor:
        """Which node is the child with a given token: bool [batch, nodes], true for one node of a row at most.

        Args: nodes int64 [batch], at `depth` - 1; depth of the children; tokens int64 [batch].
        """
        return (self.tokens == tokens[:, None]) & (self.depths == depth) & (self.parents == nodes[:, None])

    def beam_of(self, nodes: Tensor) -> Tensor:
        """The best beam that each node is on: int64 [batch]. nodes: int64 [batch]."""
        return (self.paths == nodes[:, None, None]).any(2).long().argmax(1)


def pack_beams(last: Tensor, beams: Tensor) -> DraftTree:
    """Packs drafts into trees.

    Args:
        last: int64 [batch], the newest tokens.
        beams: int64 [batch, beam_width, drafts], best beam first; no drafts make trees of their roots alone.
    """
    batch, width, drafts = beams.shape
    nodes, sizes = _shared_nodes(beams)
    paths = torch.cat((nodes.new_zeros(batch, width, 1), nodes), 2)
    # The largest tree decides; where asking for it would mean to wait for a GPU, the largest possible one.
    count = 1 + (int(sizes.max()) if last.device.type == "cpu" and width > 1 else width * drafts)
    places = nodes.flatten(1)
    empty = torch.zeros(batch, count, dtype=torch.int64, device=last.device)
    tokens = empty.scatter(1, places, beams.flatten(1))
    tokens[:, 0] = last
    steps = torch.arange(1, drafts + 1, device=last.device).repeat(width).expand(batch, -1)
    depths = empty.scatter(1, places, steps)
    parents = empty.scatter(1, places, paths[:, :, :-1].flatten(1))
    return DraftTree(tokens, depths, parents, paths, sizes)


def _shared_nodes(beams: Tensor) -> tuple[Tensor, Tensor]:
    """Node of each draft token, int64 [batch, beam_width, drafts], from 1, equal prefixes sharing theirs; how many."""
    batch, width, drafts = beams.shape
    if width == 1:
        nodes = torch.arange(1, drafts + 1, device=beams.device).expand(batch, 1, -1)
        return nodes, torch.full((batch,), drafts, device=beams.device)
    order = torch.arange(width, device=beams.device)
    same = (beams[:, :, None] == beams[:, None]).long().cumprod(-1).bool()
    # The first of the beams with this prefix has the node.
    owner = torch.where(same, order[:, None], width).amin(2)
    number = (owner == order[:, None]).flatten(1).cumsum(1).view(batch, width, drafts)
    return number.gather(1, owner), number[:, -1, -1]
