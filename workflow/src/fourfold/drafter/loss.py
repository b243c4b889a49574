"""The drafter's loss: every position of an answer starts a draft, all drafts advance together.

The rolled form of the recurrence: a draft from row r reads the tokens r, r + 1, … of its batch (the true ones, whatever
it would have drafted) and its logits i are to name token r + 1 + i. Step i keeps only the drafts that still have a
label, and logits are computed only where the label is in the draft vocabulary.

What logits are compared with is either the token itself (cross-entropy) or the target's own distribution at that place
(distillation): the target's hidden state there is a row of the batch too, so it costs one product more. A token is a
noisy sample of that distribution, so distillation learns more from the same text.
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
TEACHER_TEMPERATURE = 0.7
"""The recipe's sampling temperature; acceptance hardly depends on it."""
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


def make_teacher(output_rows: Tensor, temperature: float = TEACHER_TEMPERATURE) -> Callable[[Tensor], Tensor]:
    """The target's next-token distribution among the draft vocabulary, at a temperature.

    Args:
        output_rows: the target's output matrix for the draft vocabulary, [num_logits, hidden_size].
        temperature: that of the softmax; greater than 0.
    Returns a function, hidden states [rows, hidden_size] → float32 [rows, num_logits].
    """

    @torch.no_grad()
    def teacher(hidden: Tensor) -> Tensor:
        return torch.softmax(F.linear(hidden.to(output_rows.dtype), output_rows).float() / temperature, -1)

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

    def __call__(self, batch: Batch, weights: Tensor | None = None) -> DraftCounts:
        """Counts a batch and, with weights, adds the gradients of its weighted loss to the drafter's parameters.

        Args:
            batch: the positions.
            weights: float32 [positions]: the gradient is that of sum_i weights[i] x (summed cross-entropy at i).
                None computes no gradient.
        """
        with torch.set_grad_enabled(weights is not None):
            embeddings = self.embed(batch.tokens).to(next(self.drafter.parameters()).dtype)
            steps = rolled_states(self.drafter, embeddings, batch.remaining, self.positions)
            rows = torch.cat([step_rows for step_rows, _ in steps])
            states = torch.cat([state for _, state in steps])
        position = torch.cat([torch.full_like(step_rows, i) for i, (step_rows, _) in enumerate(steps)])
        label_rows = rows + 1 + position
        labels = self.target_to_draft[batch.tokens[label_rows]]
        known = labels >= 0
        losses, ranks = self._heads(
            batch.hidden, rows[known], label_rows[known], states[known], labels[known], position[known], weights
        )
        all_ranks = torch.full_like(labels, OUTSIDE)
        all_ranks[known] = ranks
        return self._count(batch, rows, position, known, losses, all_ranks)

    def _heads(
        self,
        hidden: Tensor,
        rows: Tensor,
        label_rows: Tensor,
        states: Tensor,
        labels: Tensor,
        position: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies, float32 [rows], and ranks of the labels, int64 [rows]; backward piece by piece.

        The logits of all rows may not fit in memory, so each piece is differentiated at once; what comes back for the
        states then goes through the recurrence in one backward pass.
        """
        losses, ranks, gradients = [], [], []
        with torch.set_grad_enabled(weights is not None):
            for start in range(0, len(labels), self.piece):
                piece = slice(start, start + self.piece)
                leaf = states[piece].detach().requires_grad_(weights is not None)
                logits = self.drafter.logits(hidden[rows[piece]].to(leaf.dtype), leaf).float()
                compared = labels[piece] if self.teacher is None else self.teacher(hidden[label_rows[piece]])
                loss = F.cross_entropy(logits, compared, reduction="none")
                if weights is not None:
                    (loss * weights[position[piece]]).sum().backward()
                    assert leaf.grad is not None
                    gradients.append(leaf.grad)
                losses.append(loss.detach())
                ranks.append(label_ranks(logits.detach(), labels[piece]))
        if gradients and states.requires_grad:
            states.backward(torch.cat(gradients))
        return torch.cat(losses or [states.new_zeros(0)]), torch.cat(ranks or [labels])

    def _count(
        self, batch: Batch, rows: Tensor, position: Tensor, known: Tensor, losses: Tensor, ranks: Tensor
    ) -> DraftCounts:
        n = self.positions
        counts = DraftCounts.zeros(n, rows.device)
        counts.drafts += (batch.remaining > 0).sum()
        counts.loss.index_add_(0, position[known], losses.double())
        counts.losses += torch.bincount(position[known], minlength=n)
        counts.labels += torch.bincount(position, minlength=n)
        for k in range(TOP_K):
            counts.hits[:, k] += torch.bincount(position[ranks <= k], minlength=n)
        wrong = torch.full_like(batch.tokens, n)  # first wrong position of the draft from each row
        wrong.scatter_reduce_(0, rows[ranks > 0], position[ranks > 0], "amin")
        wrong = torch.minimum(wrong, batch.remaining.clamp(max=n))
        for i in range(n):
            counts.accepted[i] += (wrong > i).sum()
        return counts


def count_losses(tokens: Tensor, remaining: Tensor, target_to_draft: Tensor, positions: int) -> Tensor:
    """Labels of a batch that have a loss, int64 [positions]: known before anything is computed."""
    rows = torch.arange(len(tokens), device=tokens.device)
    counts = []
    for i in range(positions):
        alive = rows[remaining > i]
        counts.append((target_to_draft[tokens[alive + 1 + i]] >= 0).sum())
    return torch.stack(counts)
