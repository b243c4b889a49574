"""What is counted while the drafter trains, as sums that add up over steps and processes.

Draft position i (from 0) predicts the token i + 2 places after the hidden state's own. Two kinds of accuracy differ:

- `redrafter{i}_top{k}`: among the labels at position i, those within the k best logits, the tokens before them being
  the true ones (teacher forcing). Marginal: it says nothing of the positions before.
- acceptance: a draft token counts only if it and all before it are the best logit. `conditional{i}` is the share of
  drafts right up to position i among those right up to i - 1; the simulated acceptance length is
  1 + sum_i P(first i + 1 right) = 1 + sum_i prod_{j<=i} conditional{j}. It counts the token that the target's
  verification yields beside the drafts, as `acceptance_length` of the engine does. Every position of an answer starts
  a draft here; decoding starts one only after the last accepted token.

A label outside the draft vocabulary counts as wrong; it has no loss. A position past the end of the answer is not a
label, but the draft counts as not accepted there, as it does in decoding.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fourfold.drafter.processes import Processes

TOP_K = 5


@dataclass
class DraftCounts:
    """Sums over drafts. n is the number of draft positions; all float64, so that they are exact and reduce alike."""

    drafts: Tensor
    """[1] drafts that were started."""
    loss: Tensor
    """[n] summed loss."""
    losses: Tensor
    """[n] labels that have a loss: those in the draft vocabulary."""
    labels: Tensor
    """[n] labels."""
    hits: Tensor
    """[n, TOP_K] labels within the k + 1 best logits."""
    accepted: Tensor
    """[n] drafts right at this position and all before it."""

    @classmethod
    def zeros(cls, positions: int, device: torch.device | str = "cpu") -> "DraftCounts":
        """Nothing counted yet."""
        n = positions
        shapes = {"drafts": (1,), "loss": (n,), "losses": (n,), "labels": (n,), "hits": (n, TOP_K), "accepted": (n,)}
        return cls(**{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()})

    def add(self, other: "DraftCounts") -> None:
        """Adds another's sums to these, in place."""
        for field in fields(self):
            mine = getattr(self, field.name)
            mine += getattr(other, field.name).to(mine.device)

    def pack(self) -> Tensor:
        """All sums in one float64 vector, to send or to store."""
        return torch.cat([getattr(self, field.name).reshape(-1) for field in fields(self)])

    @classmethod
    def unpack(cls, vector: Tensor, positions: int) -> "DraftCounts":
        """The inverse of `pack`."""
        counts = cls.zeros(positions, vector.device)
        start = 0
        for field in fields(counts):
            values = getattr(counts, field.name)
            values.copy_(vector[start : start + values.numel()].reshape(values.shape))
            start += values.numel()
        return counts

    def sum_over(self, processes: Processes) -> "DraftCounts":
        """The sums over all processes."""
        if processes.count == 1:
            return self
        return self.unpack(processes.sum(self.pack()), len(self.loss))

    @property
    def mean_loss(self) -> float:
        """Mean over positions of their mean losses; training weighs what drafts reach more."""
        return (self.loss / self.losses.clamp(min=1)).mean().item()

    @property
    def acceptance_length(self) -> float:
        """Simulated acceptance length, 1 … n + 1."""
        return 1 + (self.accepted.sum() / self.drafts.clamp(min=1)).item()

    def report(self) -> dict[str, float]:
        """Figures by name: loss; per position loss, top-1 … top-5, conditional; simulated_acceptance_length."""
        figures = {"loss": self.mean_loss}
        before = self.drafts[0]
        for i in range(len(self.loss)):
            figures[f"redrafter{i}_loss"] = (self.loss[i] / self.losses[i].clamp(min=1)).item()
            for k in range(TOP_K):
                figures[f"redrafter{i}_top{k + 1}"] = (self.hits[i, k] / self.labels[i].clamp(min=1)).item()
            figures[f"conditional{i}"] = (self.accepted[i] / before.clamp(min=1)).item()
            before = self.accepted[i]
        figures["simulated_acceptance_length"] = self.acceptance_length
        return figures


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits come before the label's; a tie goes to the lower index, as in argmax.

    Args:
        logits: [..., vocabulary].
        labels: int64 [...].
    Returns int64 [...]; 0 where the label is the argmax.
    """
    own = logits.gather(-1, labels[..., None])
    index = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > own) | ((logits == own) & (index < labels[..., None]))).sum(-1)
