"""The drafter's loss: every position of an answer starts a draft, all drafts advance together.

The rolled form of the recurrence: a draft from row r reads the tokens r, r + 1, … of its batch (the true ones, whatever
it would have drafted) and its logits i are to name token r + 1 + i. Every row is computed at every position, as tensors
[positions, rows], and a mask says where there is a label. Shapes depend on the number of rows alone then, and nothing
waits for a GPU, which can capture it all (`graphed_loss`). Little is computed in vain: what is past the end of an
answer, and what is to name a label outside the draft vocabulary.

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
"""Bound on the float32 logits of one piece of a batch; what follows from them takes about three times as much again."""
UNREACHED = 0.1
"""Weight of a draft position behind a wrong one. Not 0: the drafter is to get there more often."""


def windows(values: Tensor, positions: int) -> Tensor:
    """What lies ahead of each row: [rows + positions - 1, ...] → [positions, rows, ...], a view.

    Entry [i, r] is values[r + i].
    """
    return values.unfold(0, positions, 1).movedim(-1, 0)


def rolled_states(drafter: Redrafter, embeddings: Tensor, positions: int) -> Tensor:
    """Recurrent states of the drafts from all rows.

    Args:
        embeddings: [rows + positions - 1, hidden_size] of the rows' tokens, and of those ahead of the last.
        positions: draft positions.
    Returns [positions, rows, hidden_size], the states before each position.
    """
    read = windows(embeddings, positions)
    states = [torch.zeros_like(read[0])]
    for embedding in read:
        states.append(drafter.advance(states[-1], embedding))
    return torch.stack(states[1:])


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

    def __call__(self, batch: Batch, weight: Tensor | None = None) -> DraftCounts:
        """Counts a batch and, with a weight, adds the gradients of its weighted loss to the drafter's parameters.

        Args:
            batch: the positions.
            weight: float32 scalar on the batch's device, that of the loss at a draft position; with a teacher,
                UNREACHED times that behind a wrong one. None computes no gradient.
        """
        rows, n = len(batch.tokens), self.positions
        counts = DraftCounts.zeros(n, batch.tokens.device)
        # The last rows look ahead beyond the batch; their answers have ended there, so what they see does not count.
        tokens, hidden = F.pad(batch.tokens, (0, n)), F.pad(batch.hidden, (0, 0, 0, n))
        # The logits of all drafts may not fit in memory, so a piece of them is differentiated at once.
        for start in range(0, rows, self.drafts_at_once):
            stop = min(start + self.drafts_at_once, rows)
            piece = Batch(hidden[start : stop + n], tokens[start : stop + n], batch.remaining[start:stop])
            with torch.set_grad_enabled(weight is not None):
                self._add(piece, weight, counts)
        return counts

    def _add(self, piece: Batch, weight: Tensor | None, counts: DraftCounts) -> None:
        """Adds up rows of a batch. piece: hidden states and tokens of `positions` rows more than it has."""
        n = self.positions
        rows, position = len(piece.remaining), torch.arange(n, device=piece.tokens.device)[:, None]
        embeddings = self.embed(piece.tokens[:-1]).to(next(self.drafter.parameters()).dtype)
        states = rolled_states(self.drafter, embeddings, n)
        hidden = piece.hidden[:rows].to(states.dtype).expand(n, -1, -1)
        logits = self.drafter.logits(hidden, states).float()
        scores = torch.log_softmax(logits, -1)
        labels = self.target_to_draft[windows(piece.tokens[1:], n)]
        alive = piece.remaining > position
        known = alive & (labels >= 0)
        labels = labels.clamp(min=0)
        if self.teacher is None:
            loss = -scores.gather(-1, labels[..., None]).squeeze(-1)
        else:
            loss = -(scores * windows(self.teacher(piece.hidden[1:]), n)).sum(-1)
        loss = loss.masked_fill(~known, 0)
        ranks = label_ranks(logits.detach(), labels)
        accepted = (known & (ranks == 0)).cumprod(0)  # 1 up to the first wrong position
        if weight is not None:
            reached = F.pad(accepted[:-1], (0, 0, 1, 0), value=1)
            (loss * torch.where(reached > 0, weight, self.unreached * weight)).sum().backward()
        counts.drafts += alive[0].sum()
        counts.loss += loss.detach().sum(1, dtype=torch.float64)
        counts.losses += known.sum(1)
        counts.labels += alive.sum(1)
        within = ranks[..., None] <= torch.arange(TOP_K, device=ranks.device)
        counts.hits += (known[..., None] & within).sum(1)
        counts.accepted += accepted.sum(1)
