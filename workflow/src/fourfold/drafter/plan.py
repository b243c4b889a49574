"""What the steps of a training are: a function of settings and data, the same in every process and after a resume."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.config.drafter import DrafterTraining
from fourfold.drafter.loss import count_losses
from fourfold.drafter.samples import Text, epoch_order, group_by_length
from fourfold.drafter.states import answer_tokens


@dataclass
class Plan:
    """Groups of texts and their order. A group is what one process computes at once."""

    training: DrafterTraining
    groups: list[list[Text]]
    held_out: list[list[Text]]
    label_counts: Tensor
    """int64 [groups, positions]: labels that have a loss in each group."""
    processes: int

    @property
    def groups_per_step(self) -> int:
        """Groups that make one optimiser step, over all processes."""
        return self.training.gradient_accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; the last may have fewer groups."""
        return -(-len(self.groups) // self.groups_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.steps_per_epoch * self.training.epochs

    def groups_of(self, step: int) -> list[int]:
        """The groups of an optimiser step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.groups), self.training.seed, epoch)
        return order[place * self.groups_per_step : (place + 1) * self.groups_per_step]

    def weights_of(self, groups: Sequence[int]) -> Tensor:
        """float32 [positions], weight of a label: a step's loss is the mean over positions of their mean losses."""
        counts = self.label_counts[list(groups)].sum(0)
        return (1.0 / (counts.clamp(min=1) * len(counts))).float()


def make_plan(
    training: DrafterTraining, train: list[Text], held_out: list[Text], target_to_draft: Tensor, processes: int
) -> Plan:
    """Groups the texts. `target_to_draft`: int64 [vocab_size] on the CPU, the logit of each token or -1."""
    groups = group_by_length(train, training.micro_batch_size)
    counts = [
        count_losses(*answer_tokens(group, torch.device("cpu")), target_to_draft, training.predict_tokens)
        for group in groups
    ]
    held_out_groups = group_by_length(held_out, training.micro_batch_size)
    return Plan(training, groups, held_out_groups, torch.stack(counts), processes)
