"""Speculative decoding with a ReDrafter: draft a few tokens, verify them in one forward, keep what is right.

Greedy requests get exactly the tokens of plain greedy decoding. Sampled requests get exactly the target's
distribution: a draft d from q is kept with probability min(1, p(d) / q(d)); at the first that is not, the token is
drawn from max(p - q, 0), normalised (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.engine.sampling import ACCEPT, CHOOSE, DRAFT, SamplingBatch, draw, probabilities, uniforms
from fourfold.modeling.linear import Linear, pack_linear
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer


@dataclass
class Drafts:
    """Drafted tokens, and for sampled requests the distributions that they were drawn from.

    tokens: int64 [batch, drafts], in the target's vocabulary.
    choices: int64 [batch, drafts], the same in the drafter's.
    probabilities: float32 [sampled rows, drafts, draft vocab]; None when every request is greedy.
    """

    tokens: Tensor
    choices: Tensor
    probabilities: Tensor | None


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
    drafter: Redrafter,
    target: Transformer,
    hidden: Tensor,
    last: Tensor,
    length: int,
    batch: SamplingBatch,
    index: Tensor,
) -> Drafts:
    """Drafts `length` tokens for each sequence.

    Args:
        hidden: [batch, hidden], the target's state that predicted `last`.
        last: int64 [batch], the newest token.
        batch: sampling parameters; a sampled request draws its drafts at its own temperature.
        index: int64 [batch], tokens generated so far.
    """
    state = torch.zeros_like(hidden)
    token = last
    rows = batch.sampled_rows
    tokens, choices, distributions = [], [], []
    for i in range(length):
        state = drafter.advance(state, target.embed(token))
        logits = drafter.logits(hidden, state).float()
        choice = logits.argmax(-1)
        if batch.has_sampled:
            q = torch.softmax(logits[rows] / batch.temperature[rows, None], -1)
            choice[rows] = draw(q, uniforms(batch.seed[rows], index[rows] + i, DRAFT))
            distributions.append(q)
        token = choice if drafter.draft_to_target is None else drafter.draft_to_target[choice]
        tokens.append(token)
        choices.append(choice)
    drawn_from = torch.stack(distributions, 1) if distributions else None
    return Drafts(torch.stack(tokens, 1), torch.stack(choices, 1), drawn_from)


@torch.inference_mode()
def verify(
    logits: Tensor, drafts: Drafts, draft_to_target: Tensor | None, batch: SamplingBatch, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Decides how many drafts are kept, and the token after them.

    Args:
        logits: float32 [batch, drafts + 1, vocab], the target's, at the newest token and each draft.
        drafts: what was drafted.
        draft_to_target: int64 [draft vocab] or None, the drafter's map.
        batch, index: as for `draft`.
    Returns (kept int64 [batch] in 0 … drafts, next token int64 [batch]).
    """
    best = logits.argmax(-1)
    kept = _leading(best[:, :-1] == drafts.tokens)
    following = best.gather(1, kept[:, None]).squeeze(1)
    if batch.has_sampled:
        rows = batch.sampled_rows
        assert drafts.probabilities is not None
        kept[rows], following[rows] = _verify_sampled(
            probabilities(logits[rows], batch.sampled()),
            drafts.probabilities,
            drafts.tokens[rows],
            drafts.choices[rows],
            draft_to_target,
            batch.seed[rows],
            index[rows],
        )
    return kept, following


def _leading(right: Tensor) -> Tensor:
    """bool [batch, n] → int64 [batch]: how many are true before the first that is not."""
    return right.long().cumprod(1).sum(1)


def _verify_sampled(
    p: Tensor, q: Tensor, tokens: Tensor, choices: Tensor, mapping: Tensor | None, seed: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling. p [rows, drafts + 1, vocab], q [rows, drafts, draft vocab], the rest as in `verify`."""
    length = tokens.shape[1]
    p_draft = p[:, :-1].gather(2, tokens[..., None]).squeeze(2)
    q_draft = q.gather(2, choices[..., None]).squeeze(2)
    steps = index[:, None] + torch.arange(length, device=p.device)
    kept = _leading(uniforms(seed[:, None], steps, ACCEPT) * q_draft < p_draft)
    row = torch.arange(len(kept), device=p.device)
    residual = p[row, kept]
    # Where all drafts were kept there is nothing to subtract.
    at = kept.clamp(max=length - 1)
    subtract = q[row, at] * (kept < length)[:, None]
    residual = residual - subtract if mapping is None else residual.index_add(1, mapping, -subtract)
    residual = residual.clamp_(min=0)
    # p equal to q leaves nothing but rounding errors, and then p itself is right.
    empty = residual.sum(1, keepdim=True) <= 0
    residual = torch.where(empty, p[row, kept], residual)
    return kept, draw(residual, uniforms(seed, index + kept, CHOOSE))
