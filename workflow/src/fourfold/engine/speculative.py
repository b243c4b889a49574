"""Speculative decoding with a ReDrafter: draft a few tokens, verify them in one forward, keep what is right.

Verification asks at each node of the draft what plain decoding would choose there: the most likely token, or, with a
temperature, the token that the request's own noise draws from the target's distribution. As long as that token is among
the node's children it was drafted right, and the next node is that child. So a request's tokens are those of plain
decoding, greedy or sampled; only the number of forwards differs.

The noise is known before the target is asked (`modeling.noise`), so the drafter guesses what will be drawn: the
likeliest tokens of its own logits with that noise.
"""

import math

import torch
from torch import Tensor

from fourfold.engine.draft_plan import DraftShape
from fourfold.engine.draft_tree import DraftTree, likeliest, pack_beams, single_beam
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.modeling.noise import DraftNoise
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer


@torch.inference_mode()
def draft(
    drafter: Redrafter,
    target: Transformer,
    hidden: Tensor,
    last: Tensor,
    shape: DraftShape,
    noise: DraftNoise | None = None,
) -> DraftTree:
    """Searches for the most likely continuations and packs them into a tree.

    Args:
        hidden: [batch, hidden], the target's state that predicted `last`.
        last: int64 [batch], the newest token.
        shape: how many continuations, how long, and how likely.
        noise: that of sampled requests; None if all are greedy.
    Returns trees of 1 + beam_width * (beam_length - 1) nodes at most, tokens in the target's vocabulary.
    """
    if shape.beam_width == 1 and shape.min_p == 0 and shape.draft_tokens is None:
        return single_beam(last, _chain(drafter, target, hidden, last, shape.beam_length - 1, noise))
    beams, log_p = _beam_search(drafter, target, hidden, last, shape.beam_width, shape.beam_length - 1, noise)
    kept = log_p >= math.log(shape.min_p) if shape.min_p > 0 else torch.ones_like(beams, dtype=torch.bool)
    if shape.draft_tokens is not None:
        kept &= likeliest(beams, log_p, shape.draft_tokens)
    return pack_beams(last, beams, kept)


def _chain(
    drafter: Redrafter, target: Transformer, hidden: Tensor, last: Tensor, drafts: int, noise: DraftNoise | None
) -> Tensor:
    """The most likely token after each token: int64 [batch, drafts]. What a beam search of width 1 finds."""
    state, token, tokens = torch.zeros_like(hidden), last, []
    for depth in range(drafts):
        state = drafter.advance(state, target.embed(token))
        token = _to_target(drafter, _scores(drafter, hidden, state, depth, noise).argmax(-1))
        tokens.append(token)
    return torch.stack(tokens, 1)


def _beam_search(
    drafter: Redrafter,
    target: Transformer,
    hidden: Tensor,
    last: Tensor,
    width: int,
    drafts: int,
    noise: DraftNoise | None,
) -> tuple[Tensor, Tensor]:
    """The continuations with the highest product of probabilities, best first.

    Returns (tokens int64 [batch, width, drafts]; the logarithm of each prefix's probability, float32 of that shape).
    """
    batch = hidden.shape[0]
    state = drafter.advance(torch.zeros_like(hidden), target.embed(last))
    first, choice = _scores(drafter, hidden, state, 0, noise).float().log_softmax(-1).topk(width, -1)
    tokens, log_p = _to_target(drafter, choice)[..., None], first[..., None]
    hidden, state = (x[:, None].expand(-1, width, -1) for x in (hidden, state))
    for depth in range(1, drafts):
        state = drafter.advance(state, target.embed(tokens[..., -1]))
        # A beam's own best `width` are enough: no other can be among the best of all.
        own, choice = _scores(drafter, hidden, state, depth, noise).float().log_softmax(-1).topk(width, -1)
        best, place = (log_p[..., -1:] + own).view(batch, -1).topk(width, -1)
        newest = _to_target(drafter, choice.view(batch, -1).gather(1, place))
        parent = (place // width)[..., None]
        tokens = torch.cat((tokens.gather(1, parent.expand_as(tokens)), newest[..., None]), 2)
        log_p = torch.cat((log_p.gather(1, parent.expand_as(log_p)), best[..., None]), 2)
        state = state.gather(1, parent.expand_as(state))
    return tokens, log_p


def _scores(drafter: Redrafter, hidden: Tensor, state: Tensor, depth: int, noise: DraftNoise | None) -> Tensor:
    """What the drafter holds the tokens of a depth for: its logits, and the noise with which they will be drawn."""
    logits = drafter.logits(hidden, state)
    if noise is None:
        return logits
    return noise.add_to(logits, depth, _to_target(drafter, torch.arange(logits.shape[-1], device=logits.device)))


def _to_target(drafter: Redrafter, choice: Tensor) -> Tensor:
    return choice if drafter.draft_to_target is None else drafter.draft_to_target[choice]


@torch.inference_mode()
def verify(logits: Tensor, tree: DraftTree, batch: SamplingBatch, index: Tensor) -> tuple[Tensor, Tensor]:
    """Follows each tree for as long as the drafts are what plain decoding chooses.

    Args:
        logits: [batch, nodes, vocab], the target's at each node.
        tree: the drafts.
        batch: sampling parameters.
        index: int64 [batch], tokens generated so far.
    Returns (the last node that is kept, int64 [batch]; the token after it, int64 [batch]).
    """
    rows = torch.arange(len(index), device=index.device)
    node = torch.zeros_like(index)
    on_cpu = index.device.type == "cpu"
    everywhere = None
    if not on_cpu:
        everywhere = choose_everywhere(logits.flatten(0, 1), tree.depths, batch, index).view(tree.depths.shape)
    following = choose(logits[:, 0], batch, index) if everywhere is None else everywhere[:, 0]
    alive = torch.ones_like(index, dtype=torch.bool)
    for depth in range(1, tree.beam_length):
        child = tree.child(node, depth, following)
        alive = alive & child.any(1)
        if on_cpu and not alive.any():
            break  # a GPU would have to be waited for
        node = torch.where(alive, child.long().argmax(1), node)
        chosen = choose(logits[rows, node], batch, index + depth) if everywhere is None else everywhere[rows, node]
        following = torch.where(alive, chosen, following)
    return node, following


def choose_everywhere(
    logits: Tensor, depths: Tensor, batch: SamplingBatch, index: Tensor, row_nodes: Tensor | None = None
) -> Tensor:
    """What plain decoding chooses at every node: int64 [rows].

    Args:
        logits: [rows, vocab], the target's at each node.
        depths: int64 [batch, nodes], tokens between node 0 and each node; the last dimension contiguous.
        batch, index: as of `verify`.
        row_nodes: int64 [rows], contiguous: which of `depths`, flattened, is each row's; None: all in their order.

    One pass over all nodes takes a GPU less time than one after the other along the path that is kept.
    """
    if batch.in_kernels:
        from fourfold.engine.choose_kernels import choose_nodes  # Triton is there where a GPU is

        return choose_nodes(logits, batch, index, depths, row_nodes)
    if row_nodes is None:
        row_nodes = torch.arange(depths.numel(), device=depths.device)
    generated = (index[:, None] + depths).flatten()[row_nodes]
    return choose(logits, batch.take(row_nodes // depths.shape[1]), generated)
