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
    """int64 [batch, beam_width, beam_length]: the nodes of each beam from node 0 on; node 0 again after its end."""
    sizes: Tensor
    """int64 [batch]: nodes that are drafts."""

    @property
    def beams(self) -> Beams | None:
        """The beams, for the target's forward; None for a single one, whose nodes simply follow each other."""
        return Beams(self.paths, self.tokens.shape[1]) if self.paths.shape[1] > 1 else None

    @property
    def offsets(self) -> Tensor:
        """How far each node is from the root: int64 [batch, nodes], or [nodes] for single beams.

        What fills up a single beam lies beyond its end, out of the way of the tokens before it.
        """
        return self.depths if self.paths.shape[1] > 1 else torch.arange(self.tokens.shape[1], device=self.tokens.device)

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


def single_beam(last: Tensor, drafts: Tensor) -> DraftTree:
    """The trees of `pack_beams` for one beam each, of which all drafts are kept: each node's child is the next node.

    Args: last int64 [batch], the newest tokens; drafts int64 [batch, drafts].
    """
    batch, count = drafts.shape
    nodes = torch.arange(count + 1, device=last.device).expand(batch, -1)
    sizes = torch.full_like(last, count)
    return DraftTree(torch.cat((last[:, None], drafts), 1), nodes, (nodes - 1).clamp_(min=0), nodes[:, None], sizes)


def likeliest(beams: Tensor, log_p: Tensor, most: int) -> Tensor:
    """Which drafts are worth verifying where a tree may have `most` of them: bool [batch, beam_width, drafts].

    Args: beams int64 [batch, beam_width, drafts]; log_p of that shape, the logarithm of each prefix's probability.
    """
    width = beams.shape[1]
    owned = _owners(beams) == torch.arange(width, device=beams.device)[:, None]
    own = log_p.masked_fill(~owned, float("-inf")).flatten(1)
    least = own.topk(min(most, own.shape[1]), 1).values[:, -1]
    return log_p >= least[:, None, None]


def _owners(beams: Tensor) -> Tensor:
    """The first beam that has each prefix, whose node it is: int64 [batch, beam_width, drafts]."""
    width = beams.shape[1]
    same = (beams[:, :, None] == beams[:, None]).long().cumprod(-1).bool()
    return torch.where(same, torch.arange(width, device=beams.device)[:, None], width).amin(2)


def pack_beams(last: Tensor, beams: Tensor, kept: Tensor | None = None) -> DraftTree:
    """Packs drafts into trees.

    Args:
        last: int64 [batch], the newest tokens.
        beams: int64 [batch, beam_width, drafts], best beam first.
        kept: bool of the same shape, which drafts are worth verifying: the first few of each beam, alike for equal
            prefixes. None keeps all.
    Returns trees that are as large, wide and long as the largest, widest and longest needs to be; where asking for
    that would mean to wait for a GPU, as they can be.
    """
    batch, width, drafts = beams.shape
    if kept is None:
        kept = torch.ones_like(beams, dtype=torch.bool)
    owner = _owners(beams)
    owned = (owner == torch.arange(width, device=beams.device)[:, None]) & kept
    number = owned.flatten(1).cumsum(1).view(batch, width, drafts)
    sizes = number[:, -1, -1]
    nodes = torch.where(kept, number.gather(1, owner), 0)
    count, length = 1 + width * drafts, drafts
    if last.device.type == "cpu":
        count, length = 1 + int(sizes.max()), int(kept.any(1).sum(1).max())
        # Beams that add no node of their own are left out.
        needed = owned.any(2)
        order = needed.long().argsort(stable=True, dim=1, descending=True)[:, : max(1, int(needed.sum(1).max()))]
        rows = torch.arange(batch)[:, None]
        nodes, beams = nodes[rows, order, :length], beams[rows, order, :length]
        width = order.shape[1]
    paths = torch.cat((nodes.new_zeros(batch, width, 1), nodes), 2)
    places = nodes.flatten(1)
    steps = torch.arange(1, length + 1, device=last.device).repeat(width).expand(batch, -1)
    tree = torch.zeros(3, batch, count, dtype=torch.int64, device=last.device)
    tree.scatter_(2, places.expand(3, -1, -1), torch.stack((beams.flatten(1), steps, paths[:, :, :-1].flatten(1))))
    tree[:, :, 0] = 0  # what was left out went here
    tokens, depths, parents = tree
    tokens[:, 0] = last
    return DraftTree(tokens, depths, parents, paths, sizes)
