"""What the steps of a training are: a function of settings and data, the same in every process and after a resume."""

from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.config.drafter import DrafterTraining
from fourfold.drafter.samples import Text, epoch_order, group_by_length


@dataclass
class Plan:
    """Groups of texts and their order. A group is what one process computes at once."""

    training: DrafterTraining
    groups: list[list[Text]]
    held_out: list[list[Text]]
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

    def weight_of(self, groups: Sequence[int]) -> float:
        """Weight of a draft in an optimiser step of these groups: the step's loss is a mean over all its drafts."""
        # Every answer token but the last starts a draft, and a text has at least two.
        return 1 / sum(len(text.token_ids) - 1 for group in groups for text in self.groups[group])


def make_plan(training: DrafterTraining, train: list[Text], held_out: list[Text], processes: int) -> Plan:
    """Groups the texts."""
    size = training.micro_batch_size
    return Plan(training, group_by_length(train, size), group_by_length(held_out, size), processes)
