"""Speculative decoding with a ReDrafter: draft a few tokens, verify them in one forward, keep what is right.

Greedy requests get exactly the tokens of plain greedy decoding. Sampled requests get exactly the target's distribution
p: a draft d is kept with probability p(d), and at the first that is not, the token is drawn from p without d. That is
rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) with drafts that are certain: the
drafter's most likely token. Drafts drawn from the drafter's own distribution are refused more often while that
distribution is much flatter than the target's, as a small drafter's is.
"""

import torch
from torch import Tensor, nn

from fourfold.engine.sampling import ACCEPT, CHOOSE, SamplingBatch, draw, probabilities, uniforms
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
def draft(drafter: Redrafter, target: Transformer, hidden: Tensor, last: Tensor, length: int) -> Tensor:
    """Drafts the drafter's most likely tokens, `length` of them for each sequence.

    Args:
        hidden: [batch, hidden], the target's state that predicted `last`.
        last: int64 [batch], the newest token.
    Returns int64 [batch, length], in the target's vocabulary.
    """
    state = torch.zeros_like(hidden)
    tokens = [last]
    for _ in range(length):
        state = drafter.advance(state, target.embed(tokens[-1]))
        choice = drafter.logits(hidden, state).argmax(-1)
        tokens.append(choice if drafter.draft_to_target is None else drafter.draft_to_target[choice])
    return torch.stack(tokens[1:], 1)


@torch.inference_mode()
def verify(logits: Tensor, drafts: Tensor, batch: SamplingBatch, index: Tensor) -> tuple[Tensor, Tensor]:
    """Decides how many drafts are kept, and the token after them.

    Args:
        logits: float32 [batch, drafts + 1, vocab], the target's, at the newest token and each draft.
        drafts: int64 [batch, drafts].
        batch: sampling parameters.
        index: int64 [batch], tokens generated so far.
    Returns (kept int64 [batch] in 0 … drafts, next token int64 [batch]).
    """
    best = logits.argmax(-1)
    kept = _leading(best[:, :-1] == drafts)
    following = best.gather(1, kept[:, None]).squeeze(1)
    if batch.has_sampled:
        rows = batch.sampled_rows
        p = probabilities(logits[rows], batch.sampled())
        kept[rows], following[rows] = _verify_sampled(p, drafts[rows], batch.seed[rows], index[rows])
    return kept, following


def _leading(right: Tensor) -> Tensor:
    """bool [batch, n] → int64 [batch]: how many are true before the first that is not."""
    return right.long().cumprod(1).sum(1)


def _verify_sampled(p: Tensor, drafts: Tensor, seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling. p [rows, drafts + 1, vocab]; the rest as in `verify`."""
    length = drafts.shape[1]
    p_draft = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)
    steps = index[:, None] + torch.arange(length, device=p.device)
    kept = _leading(uniforms(seed[:, None], steps, ACCEPT) < p_draft)
    residual = p[torch.arange(len(kept), device=p.device), kept]
    # The draft that was refused cannot be drawn; where all were kept, nothing was refused.
    refused = drafts.gather(1, kept.clamp(max=length - 1)[:, None])
    factor = (kept == length).to(p.dtype)[:, None]
    residual = residual.scatter(1, refused, residual.gather(1, refused) * factor)
    return kept, draw(residual, uniforms(seed, index + kept, CHOOSE))
