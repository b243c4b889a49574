"""The drafter's loss: every position of an answer starts a draft, all drafts advance together.

The rolled form of the recurrence: a draft from row r reads the tokens r, r + 1, … of its batch (the true ones, whatever
it would have drafted) and its logits i are to name token r + 1 + i. Step i keeps only the drafts that still have a
label, and logits are computed only where the label is in the draft vocabulary.

What logits are compared with is either the token itself (cross-entropy) or the target's own distribution at that place
(distillation): the target's hidden state there is a row of the batch too, so it costs one product more. A token is a
noisy sample of that distribution, so distillation learns more from the same text.

Decoding looks at a draft position only when all draft tokens before it were right. A position behind a wrong one is
therefore learnt with a small weight, and every draft counts alike: the loss follows what acceptance length is made of.
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
"""Weight of a draft position behind a wrong one. Not 0: the drafter is to get there more often."""
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
        # Tokens alone are the recipe's loss, in which all positions count alike.
        self.unreached = 1.0 if teacher is None else UNREACHED
        self.drafts_at_once = max(1, logits_bytes // (4 * drafter.config.num_logits * positions))

    def __call__(self, batch: Batch, weight: float | None = None) -> DraftCounts:
        """Counts a batch and, with a weight, adds the gradients of its weighted loss to the drafter's parameters.

        Args:
            batch: the positions.
            weight: that of the loss at a draft position; with a teacher, UNREACHED times that behind a wrong one. None
                computes no gradient.
        """
        with torch.set_grad_enabled(weight is not None):
            embeddings = self.embed(batch.tokens).to(next(self.drafter.parameters()).dtype)
            steps = rolled_states(self.drafter, embeddings, batch.remaining, self.positions)
            rows = torch.cat([step_rows for step_rows, _ in steps])
            states = torch.cat([state for _, state in steps])
        position = torch.cat([torch.full_like(step_rows, i) for i, (step_rows, _) in enumerate(steps)])
        label_rows = rows + 1 + position
        labels = self.target_to_draft[batch.tokens[label_rows]]
        known = labels >= 0
        losses, ranks = torch.zeros_like(labels, dtype=torch.float32), torch.full_like(labels, OUTSIDE)
        gradient = torch.zeros_like(states)
        wrong = torch.full_like(batch.tokens, self.positions)  # first wrong position of the draft from each row
        wrong.scatter_reduce_(0, rows[~known], position[~known], "amin")
        # The logits of all drafts may not fit in memory, so a piece of them is differentiated at once; what comes back
        # for the states then goes through the recurrence in one backward pass.
        for start in range(0, len(batch.tokens), self.drafts_at_once):
            piece = (known & (rows >= start) & (rows < start + self.drafts_at_once)).nonzero().squeeze(1)
            with torch.set_grad_enabled(weight is not None):
                leaf = states[piece].detach().requires_grad_(weight is not None)
                hidden, label_hidden = batch.hidden[rows[piece]], batch.hidden[label_rows[piece]]
                loss, ranks[piece] = self._compare(hidden, label_hidden, leaf, labels[piece])
            losses[piece] = loss.detach()
            missed = piece[ranks[piece] > 0]
            wrong.scatter_reduce_(0, rows[missed], position[missed], "amin")
            if weight is not None and len(piece):
                reached = position[piece] <= wrong[rows[piece]]
                (loss * torch.where(reached, weight, self.unreached * weight)).sum().backward()
                assert leaf.grad is not None
                gradient[piece] = leaf.grad
        if states.requires_grad:
            states.backward(gradient)
        return self._count(batch, position, known, losses, ranks, wrong)

    def _compare(self, hidden: Tensor, label_hidden: Tensor, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, float32 [rows], and ranks of the labels, int64 [rows]."""
        logits = self.drafter.logits(hidden.to(states.dtype), states).float()
        compared = labels if self.teacher is None else self.teacher(label_hidden)
        return F.cross_entropy(logits, compared, reduction="none"), label_ranks(logits.detach(), labels)

    def _count(
        self, batch: Batch, position: Tensor, known: Tensor, losses: Tensor, ranks: Tensor, wrong: Tensor
    ) -> DraftCounts:
        n = self.positions
        counts = DraftCounts.zeros(n, position.device)
        counts.drafts += (batch.remaining > 0).sum()
        counts.loss.index_add_(0, position[known], losses[known].double())
        counts.losses += torch.bincount(position[known], minlength=n)
        counts.labels += torch.bincount(position, minlength=n)
        for k in range(TOP_K):
            counts.hits[:, k] += torch.bincount(position[ranks <= k], minlength=n)
        right = torch.minimum(wrong, batch.remaining.clamp(max=n))
        for i in range(n):
            counts.accepted[i] += (right > i).sum()
        return counts
