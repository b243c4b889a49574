"""The training loop: steps along a plan, rows on the way, the held-out texts after each epoch, checkpoints by time.

Processes add up their gradients once a step: N processes that accumulate G passes train as one that accumulates N x G,
up to rounding. The drafter is small beside its target, so one plain sum serves.

On a GPU a batch's loss and gradients are replayed as a CUDA graph, and a step reads nothing back: the next one is
launched while it runs.
"""

import time
from pathlib import Path

import torch

from fourfold.drafter.graphed_loss import GraphedLoss
from fourfold.drafter.loss import DraftLoss
from fourfold.drafter.metrics import DraftCounts
from fourfold.drafter.plan import Plan
from fourfold.drafter.processes import Processes
from fourfold.drafter.schedule import learning_rate
from fourfold.drafter.states import TargetStates
from fourfold.drafter.trackers import Trackers
from fourfold.drafter.training_state import StopRequest, TrainingState
from fourfold.modeling.transformer import Transformer
from fourfold.progress import logger, progress

ROWS = 200
"""Rows on the steps in training.csv, about."""
NOTE_SECONDS = 1.0
"""Seconds between looks at the loss for the progress: a look waits for a GPU."""
MAX_GRADIENT_NORM = 1.0


class Stopped(Exception):
    """A signal asked for the end; the state is saved."""


class Trainer:
    """Trains a state along a plan, in every process alike; the first one writes."""

    def __init__(
        self,
        plan: Plan,
        state: TrainingState,
        loss: DraftLoss,
        target: Transformer,
        trackers: Trackers | None,
        processes: Processes,
        checkpoint: Path,
    ) -> None:
        self.plan, self.state, self.trackers = plan, state, trackers
        self.loss = GraphedLoss(loss) if processes.device.type == "cuda" else loss
        self.processes, self.checkpoint = processes, checkpoint
        self.train_states = TargetStates(target, plan.groups)
        self.held_out_states = TargetStates(target, plan.held_out)
        self.step_ms: float | None = None
        """Milliseconds that a step of the newest epoch took, its evaluation included."""
        self.parameters = list(state.drafter.parameters())
        # The same tensors from first to last: what a graph adds to.
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def run(self, request: StopRequest) -> None:
        """Trains to the end. Raises Stopped when a signal asked for the end before, after saving."""
        state, plan = self.state, self.plan
        row_steps = max(1, plan.steps // ROWS)
        start = saved = begun = time.monotonic()
        tokens, note, noted = 0, "", 0.0
        with progress("train", plan.steps - state.step, "steps") as task:
            while state.step < plan.steps:
                groups = plan.groups_of(state.step)
                stop = self.step(groups, request)
                tokens += sum(len(text.token_ids) for group in groups for text in plan.groups[group])
                if time.monotonic() - noted > NOTE_SECONDS:
                    note = f"loss {state.counts.mean_loss:.3f}, {tokens / (time.monotonic() - start):.0f} tok/s"
                    noted = time.monotonic()
                if state.step % row_steps == 0 or state.step == plan.steps:
                    self.report()
                if state.step % plan.steps_per_epoch == 0:
                    self.evaluate()
                    self.step_ms = 1000 * (time.monotonic() - begun) / plan.steps_per_epoch
                    begun = time.monotonic()
                if stop or time.monotonic() - saved > plan.training.checkpoint_minutes * 60:
                    self.save()
                    saved = time.monotonic()
                task.advance(1, note)
                if stop and state.step < plan.steps:
                    raise Stopped

    def step(self, groups: list[int], request: StopRequest) -> bool:
        """One optimiser step; whether any process was asked to stop."""
        state, training = self.state, self.plan.training
        weight = torch.full((), self.plan.weight_of(groups), device=self.processes.device)
        counts = DraftCounts.zeros(training.predict_tokens, self.processes.device)
        for group in groups[self.processes.rank :: self.processes.count]:
            with self.autocast():
                counts.add(self.loss(self.train_states.batch(group), weight))
        state.counts.add(counts.sum_over(self.processes))
        stop = self.share_gradients(request.signal is not None)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = self.rate(state.step)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=False)
        state.step += 1
        return stop

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        training = self.plan.training
        return learning_rate(step, self.plan.steps, training.learning_rate, training.warmup_ratio)

    def autocast(self) -> torch.autocast:
        """bfloat16 products on a GPU; a CPU computes in float32."""
        on_gpu = self.processes.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False)

    def share_gradients(self, stop: bool) -> bool:
        """Adds up gradients and the wish to stop over all processes, in one message."""
        if self.processes.count == 1:
            return stop
        flat = torch.cat([part.flatten() for part in self.gradients] + [self.gradients[0].new_tensor([float(stop)])])
        self.processes.sum(flat)
        parts = flat[:-1].split([gradient.numel() for gradient in self.gradients])
        for gradient, part in zip(self.gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bool(flat[-1] > 0)

    def report(self) -> None:
        """A row on the steps since the last one."""
        state = self.state
        self.add_row("train", state.counts, self.rate(state.step - 1))
        state.counts = DraftCounts.zeros(self.plan.training.predict_tokens, self.processes.device)

    def evaluate(self) -> None:
        """Judges the drafter on the held-out texts and keeps the best weights."""
        state = self.state
        counts = DraftCounts.zeros(self.plan.training.predict_tokens, self.processes.device)
        for group in range(self.processes.rank, len(self.plan.held_out), self.processes.count):
            with self.autocast():
                counts.add(self.loss(self.held_out_states.batch(group)))
        counts = counts.sum_over(self.processes)
        epoch = state.step // self.plan.steps_per_epoch
        state.note_best(epoch, counts.acceptance_length)
        self.add_row("heldout", counts, None)
        rates = ", ".join(f"{rate:.3f}" for rate in (counts.accepted / counts.drafts).tolist())
        logger.info(
            "epoch %d of %d: held out, simulated acceptance length %.3f (1 + accepted / drafts; accepted at each "
            "position: %s)",
            epoch,
            self.plan.training.epochs,
            counts.acceptance_length,
            rates,
        )

    def add_row(self, split: str, counts: DraftCounts, rate: float | None) -> None:
        """Adds a row to training.csv and sends it to the trackers."""
        state = self.state
        figures = counts.report()
        epoch = -(-state.step // self.plan.steps_per_epoch)
        state.rows.append({"split": split, "epoch": epoch, "step": state.step, "learning_rate": rate, **figures})
        if self.trackers is not None:
            self.trackers.log(split, state.step, figures if rate is None else figures | {"learning_rate": rate})

    def save(self) -> None:
        """Writes the checkpoint."""
        if self.processes.first:
            self.state.save(self.checkpoint)
            logger.info("step %d of %d: checkpoint saved", self.state.step, self.plan.steps)
