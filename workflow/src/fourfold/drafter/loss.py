"""The drafter's loss: every position of an answer starts a draft, all drafts advance together.

The rolled form of the recurrence: a draft from row r reads the tokens r, r + 1, … of its batch (the true ones, whatever
it would have drafted) and its logits i are to name token r + 1 + i. Step i keeps only the drafts that still have a
label, and logits are computed only where the label is in the draft vocabulary.

What logits are compared with is either the token itself (cross-entropy) or the target's own distribution at that place
(distillation): the target's hidden state there is a row of the batch too, so it costs one product more. A token is a
noisy sample of that distribution, so distillation learns more from the same text.

Decoding looks at a draft position only when all draft tokens before it were right. A position behind a wrong one is
therefore learnt with a small weight, and each draft counts alike, whatever its length: the loss follows what acceptance
length is made of.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.drafter.metrics import TOP_K, DraftCounts, label_ranks
from fourfold.drafter.states import Batch
from fourfold.modeling.redrafter import Redrafter

LOGITS_BYTES = 256 * 2**20
"""Bound on the float32 logits of one piece of a batch; gradients take about twice as much again."""
UNREACHED = 0.1
"""Weight of a draft position behind a wrong one. Not 0: what is learnt there helps where drafts get that far."""
OUTSIDE = 2**31
"""Rank of a label that cannot be drafted: behind every other."""


def rolled_states(
    drafter: Redrafter, embeddings: Tensor, remaining: Tensor, positions: int
) -> list[tuple[Tensor, Tensor]]:
    """Recurrent states of all drafts of a batch.

    Args:
        embeddings: [rows, hidden_size] of the batch's tokens.
        remaining: int64 [rows], labels that a draft from each row has.
        positions: draft positions.
    Returns for each position i the rows whose draft has a label there, int64 [k], and their states before it,
    [k, hidden_size].
    """
    rows = torch.arange(len(remaining), device=remaining.device)
    state = torch.zeros_like(embeddings)
    steps = []
    for i in range(positions):
        alive = remaining[rows] > i
        rows, state = rows[alive], state[alive]
        state = drafter.advance(state, embeddings[rows + i])
        steps.append((rows, state))
    return steps


def make_teacher(output_rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The target's next-token distribution among the draft vocabulary.

    Args:
        output_rows: the target's output matrix for the draft vocabulary, [num_logits, hidden_size].
    Returns a function, hidden states [rows, hidden_size] → float32 [rows, num_logits].
    """

    @torch.no_grad()
    def teacher(hidden: Tensor) -> Tensor:
        return torch.softmax(F.linear(hidden.to(output_rows.dtype), output_rows).float(), -1)

    return teacher


class DraftLoss:
    """Loss, gradients and counts of a batch.

    Args:
        drafter: the network; on the batch's device.
        embed: the target's input embeddings, int64 [...] → [..., hidden_size].
        target_to_draft: int64 [vocab_size], the logit of each token, -1 for those outside the draft vocabulary.
        positions: draft positions.
        teacher: the target's distribution over the draft vocabulary, hidden states [rows, hidden_size] →
            [rows, num_logits]; None compares with the tokens alone.
        logits_bytes: bound on the logits held at once.
    """

    def __init__(
        self,
        drafter: Redrafter,
        embed: Callable[[Tensor], Tensor],
        target_to_draft: Tensor,
        positions: int,
        teacher: Callable[[Tensor], Tensor] | None = None,
        logits_bytes: int = LOGITS_BYTES,
    ) -> None:
        self.drafter, self.embed, self.target_to_draft, self.positions = drafter, embed, target_to_draft, positions
        self.teacher = teacher
        self.piece = max(1, logits_bytes // (4 * drafter.config.num_logits))

    def __call__(self, batch: Batch, weight: float | None = None) -> DraftCounts:
        """Counts a batch and, with a weight, adds the gradients of its weighted loss to the drafter's parameters.

        Args:
            batch: the positions.
            weight: that of a loss at a position that its draft reaches; where a draft token before it is wrong, the
                loss has UNREACHED times that weight. None computes no gradient.
        """
        counts = DraftCounts.zeros(self.positions, batch.tokens.device)
        counts.drafts += (batch.remaining > 0).sum()
        right = torch.ones_like(batch.tokens, dtype=torch.bool)  # the draft from each row, so far
        learnt: list[Tensor] = []
        gradients: list[Tensor] = []
        with torch.set_grad_enabled(weight is not None):
            embeddings = self.embed(batch.tokens).to(next(self.drafter.parameters()).dtype)
            steps = rolled_states(self.drafter, embeddings, batch.remaining, self.positions)
            for i, (rows, states) in enumerate(steps):
                labels = self.target_to_draft[batch.tokens[rows + 1 + i]]
                known = labels >= 0
                kept, kept_states = rows[known], states[known]
                weights = None if weight is None else weight * torch.where(right[kept], 1.0, UNREACHED)
                losses, ranks, gradient = self._head(
                    batch.hidden[kept], batch.hidden[kept + 1 + i], kept_states, labels[known], weights
                )
                learnt.append(kept_states)
                gradients += gradient
                all_ranks = torch.full_like(labels, OUTSIDE)
                all_ranks[known] = ranks
                right[rows] &= all_ranks == 0
                counts.loss[i] += losses.double().sum()
                counts.losses[i] += len(kept)
                counts.labels[i] += len(rows)
                for k in range(TOP_K):
                    counts.hits[i, k] += (all_ranks <= k).sum()
                counts.accepted[i] += right[rows].sum()
            states = torch.cat(learnt)
            if gradients and states.requires_grad:
                states.backward(torch.cat(gradients))
        return counts

    def _head(
        self, hidden: Tensor, label_hidden: Tensor, states: Tensor, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Losses, float32 [rows], ranks of the labels, int64 [rows], and the gradient of the states, in pieces.

        The logits of all rows may not fit in memory, so each piece is differentiated at once; what comes back for the
        states is to go through the recurrence in one backward pass.
        """
        losses, ranks, gradients = [states.new_zeros(0)], [labels[:0]], []
        for start in range(0, len(labels), self.piece):
            piece = slice(start, start + self.piece)
            leaf = states[piece].detach().requires_grad_(weights is not None)
            logits = self.drafter.logits(hidden[piece].to(leaf.dtype), leaf).float()
            compared = labels[piece] if self.teacher is None else self.teacher(label_hidden[piece])
            loss = F.cross_entropy(logits, compared, reduction="none")
            if weights is not None:
                (loss * weights[piece]).sum().backward()
                assert leaf.grad is not None
                gradients.append(leaf.grad)
            losses.append(loss.detach())
            ranks.append(label_ranks(logits.detach(), labels[piece]))
        return torch.cat(losses), torch.cat(ranks), gradients
