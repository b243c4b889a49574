"""Speculative decoding with a ReDrafter: draft a few tokens, verify them in one forward, keep what is right.

Verification asks at each node of the draft what plain decoding would choose there: the most likely token, or, with a
temperature, the token that the request's own random numbers draw from the target's distribution. As long as that token
is among the node's children it was drafted right, and the next node is that child. So a request's tokens are those of
plain decoding, greedy or sampled; only the number of forwards differs. (For sampled requests this is rejection
sampling, Leviathan et al., arXiv 2211.17192, with drafts that are certain: a draft d is kept with probability p(d), and
what replaces it has p's distribution without d.)
"""

import torch
from torch import Tensor, nn

from fourfold.engine.draft_tree import DraftTree, pack_beams
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.modeling.linear import Linear, pack_linear
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer


class _Packed(nn.Module):
    """Stands for an nn.Linear with the engine's own layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.linear: Linear = pack_linear(linear.weight.detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def pack_drafter(drafter: Redrafter) -> Redrafter:
    """Puts the engine's packed layers in the place of the drafter's own; changes and returns the drafter."""
    for module in list(drafter.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Packed(child))
    return drafter


@torch.inference_mode()
def draft(
    drafter: Redrafter, target: Transformer, hidden: Tensor, last: Tensor, beam_width: int, beam_length: int
) -> DraftTree:
    """Searches for the most likely continuations and packs them into a tree.

    Args:
        hidden: [batch, hidden], the target's state that predicted `last`.
        last: int64 [batch], the newest token.
        beam_width: continuations that are kept at every step.
        beam_length: their length with the newest token: beam_length - 1 tokens are drafted.
    Returns trees of 1 + beam_width * (beam_length - 1) nodes at most, tokens in the target's vocabulary.
    """
    if beam_width == 1:
        beams = _most_likely(drafter, target, hidden, last, beam_length - 1)[:, None]
    else:
        beams = _beam_search(drafter, target, hidden, last, beam_width, beam_length - 1)
    return pack_beams(last, beams)


def _most_likely(drafter: Redrafter, target: Transformer, hidden: Tensor, last: Tensor, drafts: int) -> Tensor:
    """The most likely token at each step: int64 [batch, drafts]."""
    state = torch.zeros_like(hidden)
    tokens = [last]
    for _ in range(drafts):
        state = drafter.advance(state, target.embed(tokens[-1]))
        tokens.append(_to_target(drafter, drafter.logits(hidden, state).argmax(-1)))
    return torch.stack(tokens[1:], 1)


def _beam_search(
    drafter: Redrafter, target: Transformer, hidden: Tensor, last: Tensor, width: int, drafts: int
) -> Tensor:
    """The continuations with the highest product of probabilities: int64 [batch, width, drafts], best first."""
    batch = hidden.shape[0]
    state = drafter.advance(torch.zeros_like(hidden), target.embed(last))
    log_p = drafter.logits(hidden, state).float().log_softmax(-1)
    scores, choice = log_p.topk(width, -1)
    beams = _to_target(drafter, choice)[..., None]
    state = state[:, None].expand(-1, width, -1)
    hidden = hidden[:, None].expand(-1, width, -1)
    for _ in range(drafts - 1):
        state = drafter.advance(state, target.embed(beams[..., -1]))
        log_p = drafter.logits(hidden, state).float().log_softmax(-1)
        # A beam's own best `width` are enough: no other can be among the best of all.
        own, choice = log_p.topk(width, -1)
        scores, place = (scores[..., None] + own).view(batch, -1).topk(width, -1)
        parent = place // width
        tokens = _to_target(drafter, choice.view(batch, -1).gather(1, place))
        beams = torch.cat((beams.gather(1, parent[..., None].expand(-1, -1, beams.shape[2])), tokens[..., None]), 2)
        state = state.gather(1, parent[..., None].expand(-1, -1, state.shape[2]))
    return beams


def _to_target(drafter: Redrafter, choice: Tensor) -> Tensor:
    return choice if drafter.draft_to_target is None else drafter.draft_to_target[choice]


@torch.inference_mode()
def verify(logits: Tensor, tree: DraftTree, batch: SamplingBatch, index: Tensor) -> tuple[Tensor, Tensor]:
    """Follows each tree for as long as the drafts are what plain decoding chooses.

    Args:
        logits: float32 [batch, nodes, vocab], the target's at each node.
        tree: the drafts.
        batch: sampling parameters.
        index: int64 [batch], tokens generated so far.
    Returns (the last node that is kept, int64 [batch]; the token after it, int64 [batch]).
    """
    rows = torch.arange(len(index), device=index.device)
    node = torch.zeros_like(index)
    following = choose(logits[:, 0], batch, index)
    alive = torch.ones_like(index, dtype=torch.bool)
    for depth in range(1, tree.beam_length):
        child = tree.child(node, depth, following)
        alive = alive & child.any(1)
        if index.device.type == "cpu" and not alive.any():
            break  # a GPU would have to be waited for
        node = torch.where(alive, child.long().argmax(1), node)
        following = torch.where(alive, choose(logits[rows, node], batch, index + depth), following)
    return node, following
