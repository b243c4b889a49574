"""Drafting a tree with one trunk, by the network itself: the reference of `draft_decode.DraftChain`."""

import torch
from torch import Tensor

from fourfold.modeling.noise import DraftNoise
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.modeling.trunk_tree import TrunkTree, chain_tree, nodes_of, pick_nodes


@torch.inference_mode()
def draft_trunk(
    drafter: Redrafter,
    target: Transformer,
    hidden: Tensor,
    last: Tensor,
    drafts: int,
    width: int = 1,
    nodes: int | None = None,
    noise: DraftNoise | None = None,
    most: int | None = None,
    runs: Tensor | None = None,
) -> TrunkTree:
    """Drafts the likeliest chain, and the likeliest tokens beside it.

    Args:
        hidden: [batch, hidden], the target's states that predicted `last`.
        last: int64 [batch], the newest tokens.
        drafts: tokens of the trunk.
        width: candidates of each depth.
        nodes: how many of them are kept; None keeps all that a mask has bits for.
        noise: that of sampled requests; None if all are greedy.
        most, runs: for trees that share their nodes, as of `pick_nodes`.
    Returns trees of 1 + nodes nodes, or 1 + most where they share them; tokens in the target's vocabulary.
    """
    kept = nodes_of(drafts, width, nodes)
    logits = torch.arange(drafter.config.num_logits, device=last.device)
    names = logits if drafter.draft_to_target is None else drafter.draft_to_target
    state, token = torch.zeros_like(hidden), last
    trunk = torch.zeros(len(last), 1, device=last.device)
    tokens, log_p = [], []
    for depth in range(drafts):
        state = drafter.advance(state, target.embed(token))
        scores = drafter.logits(hidden, state).float()
        if noise is not None:
            scores = noise.add_to(scores, depth, names)
        best, choice = (x[:, :width] for x in scores.sort(dim=-1, descending=True, stable=True))
        tokens.append(names[choice])
        own = best - scores.logsumexp(-1, keepdim=True)
        # Neither NaN nor a rounding may make a path likelier than a part of it.
        log_p.append(trunk + torch.where(own < 0, own, 0.0))
        token, trunk = tokens[-1][:, 0], log_p[-1][:, :1]
    if width == 1:
        return chain_tree(torch.cat((last[:, None], *tokens), 1)[:, : 1 + kept])
    return pick_nodes(last, torch.stack(tokens, 1), torch.stack(log_p, 1), kept, most, runs)
