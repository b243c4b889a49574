"""The train_drafter stage: the ReDrafter learns to continue the frozen target's answers.

The target's hidden states are computed online; the loss is at each draft position, on answer tokens alone. A hash of
the problem holds some texts out; after each epoch they judge the drafter by its simulated acceptance length, and the
best epoch is what is written. Checkpoints are in the work folder: a training that was killed goes on where it was, to
the same bits on a CPU. Under torchrun several processes share the work.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from fourfold.artifacts import Staging, read_manifest, write_artifact
from fourfold.artifacts.code import code_hash
from fourfold.artifacts.files import sha256_file, write_text
from fourfold.artifacts.provenance import device_name
from fourfold.config.stages import DrafterTrainStage
from fourfold.drafter.initial import initial_redrafter, output_rows
from fourfold.drafter.journal import work_key
from fourfold.drafter.loss import DraftLoss, make_teacher
from fourfold.drafter.metrics import DraftCounts
from fourfold.drafter.plan import make_plan
from fourfold.drafter.processes import Processes, join_processes
from fourfold.drafter.rows import to_csv
from fourfold.drafter.samples import read_texts, split_held_out
from fourfold.drafter.trackers import Trackers
from fourfold.drafter.trainer import Stopped, Trainer
from fourfold.drafter.training_state import TrainingState, catch_stop
from fourfold.drafter.vocabulary import choose_draft_vocabulary, invert
from fourfold.errors import FourfoldError
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import RedrafterConfig, save_redrafter
from fourfold.progress import logger

SAVED_DTYPE = torch.bfloat16
METRICS_FILE = "training.csv"


def train_drafter(
    settings: DrafterTrainStage, target: Path, data: Path, work: Path, output: Path, device: str
) -> float | None:
    """Trains a drafter and writes its checkpoint with training.csv.

    Args:
        settings: shape and training.
        target: manifest of the checkpoint to draft for.
        data: manifest of the training texts.
        work: folder for the checkpoint of the training itself.
        output: manifest of the drafter to write.
        device: auto, cpu or cuda.
    Returns milliseconds a step of the last epoch, its evaluation included; None if nothing was left to train.
    Raises FourfoldError for data that cannot be used, and SystemExit (128 + signal) after SIGTERM or SIGINT, with the
    state saved.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(device))
        request = stack.enter_context(catch_stop())
        # Claimed before the training, so that no other process trains the same drafter meanwhile.
        staging = stack.enter_context(drafter_artifact(settings, target, data, output, processes))
        trainer = prepare(settings, target, data, work, processes)
        if trainer.checkpoint.exists():
            trainer.state.load(trainer.checkpoint)
            logger.info("resuming at step %d of %d", trainer.state.step, trainer.plan.steps)
        try:
            trainer.run(request)
        except Stopped:
            logger.info("stopped at step %d; the same command goes on from there", trainer.state.step)
            # Every process saw the same request in the same step; only some have had the signal itself.
            raise SystemExit(128 + (request.signal or 15)) from None
        finally:
            if trainer.trackers is not None:
                trainer.trackers.close()
        if staging is not None:
            write_drafter(trainer, staging)
    if processes.first:
        trainer.state.discard(trainer.checkpoint)
    return trainer.step_ms


def drafter_artifact(
    settings: DrafterTrainStage, target: Path, data: Path, output: Path, processes: Processes
) -> AbstractContextManager[Staging | None]:
    """The drafter's artifact, for the process that writes; None for the others."""
    if not processes.first:
        return nullcontext()
    return write_artifact(
        output,
        stage="train_drafter",
        settings=settings.model_dump(),
        inputs={"target": target, "data": data},
        libraries=["torch", "safetensors"],
        device=device_name(str(processes.device)),
    )


def prepare(settings: DrafterTrainStage, target: Path, data: Path, work: Path, processes: Processes) -> Trainer:
    """Reads and checks everything, and makes the trainer in its first state. Raises FourfoldError."""
    shape, training = settings.shape, settings.training
    trackers = Trackers(training.trackers, work, settings.model_dump()) if processes.first else None
    end_token_ids = read_manifest(data)["end_token_ids"]
    train, held_out = split_held_out(read_texts(data, training.max_length))
    transformer = load_transformer(target.parent, str(processes.device))
    vocab_size, hidden_size = transformer.config.vocab_size, transformer.config.hidden_size
    check_tokens(train + held_out, vocab_size, data)
    draft_to_target = None
    if shape.draft_vocab_size is not None:
        answers = (text.token_ids for text in train)
        draft_to_target = choose_draft_vocabulary(answers, shape.draft_vocab_size, vocab_size, end_token_ids)
    config = RedrafterConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        exit_dim=shape.exit_dim or 2 * hidden_size,
        num_draft_layers=shape.num_draft_layers,
        rnn=shape.rnn,
        draft_vocab_size=shape.draft_vocab_size,
    )
    drafter = initial_redrafter(config, draft_to_target, transformer, training.seed)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    target_to_draft = invert(draft_to_target, vocab_size)
    positions = training.predict_tokens
    plan = make_plan(training, train, held_out, processes.count)
    counts = DraftCounts.zeros(positions, processes.device)
    teacher = None
    if training.loss == "distillation":
        teacher = make_teacher(output_rows(transformer, draft_to_target).to(transformer.dtype))
    loss = DraftLoss(drafter, transformer.embed, target_to_draft.to(processes.device), positions, teacher)
    inputs = {"target": sha256_file(target), "data": sha256_file(data), "code": code_hash(__name__)}
    key = work_key(settings.model_dump_json(), inputs | {"processes": str(processes.count)})
    state = TrainingState(drafter, optimizer, counts)
    return Trainer(plan, state, loss, transformer, trackers, processes, work / f"training-{key}.pt")


def check_tokens(texts: list[Any], vocab_size: int, data: Path) -> None:
    """Raises FourfoldError when a text has a token that the target does not know: it was made by another model."""
    for text in texts:
        highest = max(*text.prompt_token_ids, *text.token_ids)
        if highest >= vocab_size:
            raise FourfoldError(
                f"{data}: text {text.id} has token {highest}, but the target knows {vocab_size}; "
                "make the data with the same model"
            )


def write_drafter(trainer: Trainer, staging: Staging) -> None:
    """Writes the best epoch's drafter, its metrics and what it was trained on."""
    state, plan = trainer.state, trainer.plan
    state.drafter.load_state_dict(state.best_weights)
    train = [text for group in plan.groups for text in group]
    held_out = [text for group in plan.held_out for text in group]
    save_redrafter(state.drafter, staging.path, SAVED_DTYPE)
    write_text(staging.path / METRICS_FILE, to_csv(state.rows))
    staging.facts = {
        "predict_tokens": plan.training.predict_tokens,
        "texts": len(train),
        "answer_tokens": sum(len(text.token_ids) for text in train),
        "heldout_texts": len(held_out),
        "heldout_answer_tokens": sum(len(text.token_ids) for text in held_out),
        "processes": plan.processes,
        "steps": plan.steps,
        "best_epoch": state.best_epoch,
        "heldout_simulated_acceptance_length": state.best_length,
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
    }
    logger.info(
        "best epoch %d: held-out simulated acceptance length %.3f (1 + accepted / drafts, bonus token counted)",
        state.best_epoch,
        state.best_length,
    )
