"""Training a drafter for a tiny model: killed, resumed, and in two processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_stages import PROBLEMS, SHAPE, Killed, assert_same_drafter, metrics, train, training
from test_drafter_loss import Uncaptured

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import read_jsonl, write_jsonl
from fourfold.drafter.initial import HEAD_SCALE, output_rows
from fourfold.drafter.states import TargetStates
from fourfold.drafter.trainer import Trainer
from fourfold.errors import FourfoldError
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import load_redrafter


def test_it_learns_and_keeps_the_best_epoch(root: Path, uninterrupted: Path) -> None:
    steps, epochs = metrics(uninterrupted, "train"), metrics(uninterrupted, "heldout")
    manifest = read_manifest(uninterrupted / "manifest.json")
    # The loss cannot fall below the entropy of the target's distribution, and a random model's is high.
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"]) - 0.03
    assert len(steps) == manifest["steps"]
    assert [row["epoch"] for row in epochs] == ["1", "2", "3", "4"]
    lengths = [float(row["simulated_acceptance_length"]) for row in epochs]
    assert manifest["best_epoch"] == 1 + lengths.index(max(lengths))
    assert manifest["heldout_simulated_acceptance_length"] == pytest.approx(max(lengths), rel=1e-5)
    assert manifest["texts"] + manifest["heldout_texts"] == 2 * PROBLEMS
    assert manifest["parameters"] == sum(p.numel() for p in load_redrafter(uninterrupted).parameters())
    assert manifest["tensor_bytes"]["BF16"] == 2 * manifest["parameters"]


def test_the_draft_vocabulary_can_end_the_text(root: Path, uninterrupted: Path) -> None:
    drafter = load_redrafter(uninterrupted)
    ends = read_manifest(root / "data" / "manifest.json")["end_token_ids"]
    assert drafter.draft_to_target is not None
    assert set(ends) <= set(drafter.draft_to_target.tolist())
    assert json.loads((uninterrupted / "config.json").read_text())["vocab_size"] > 48


@pytest.mark.parametrize("step", [1, 5, 6, 13, 20])
def test_a_killed_training_resumes_to_the_same_bits(
    root: Path, uninterrupted: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = Trainer.step

    def step_and_die(self: Trainer, *arguments: Any) -> bool:
        if self.state.step == step:
            raise Killed
        return one_step(self, *arguments)

    settings = training(checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_die)
        with pytest.raises(Killed):
            train(root, f"killed {step}", settings)
    assert not (root / f"killed {step}").exists()
    assert list((root / "work").glob("training-*.pt"))
    assert_same_drafter(train(root, f"killed {step}", settings), uninterrupted)
    assert not list((root / "work").glob("training-*.pt")), "the checkpoint is gone once the drafter is written"


def test_a_signal_saves_and_ends_with_its_exit_code(
    root: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = Trainer.step

    def step_with_signal(self: Trainer, *arguments: Any) -> bool:
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_with_signal)
        with pytest.raises(SystemExit) as stopped:
            train(root, "signalled", training())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []
    monkeypatch.setattr(
        Trainer, "step", lambda self, *arguments: (seen.append(self.state.step), one_step(self, *arguments))[1]
    )
    assert_same_drafter(train(root, "signalled", training()), uninterrupted)
    assert seen[0] == 8, "the step that the signal came in is not repeated"


def test_states_that_are_computed_anew_have_the_same_bits(
    root: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = TargetStates.__init__
    monkeypatch.setattr(TargetStates, "__init__", lambda self, target, groups: initial(self, target, groups, 20_000))
    assert_same_drafter(train(root, "forgetful", training()), uninterrupted)


def test_a_broken_checkpoint_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = training(checkpoint_minutes=1e-9, seed=9)
    one_step, steps = Trainer.step, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "step",
            lambda self, *a: one_step(self, *a) if next(steps) < 2 else (_ for _ in ()).throw(Killed),
        )
        with pytest.raises(Killed):
            train(root, "broken", settings)
    (checkpoint,) = (root / "work").glob("training-*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(FourfoldError, match=r"training-.*\.pt: cannot be read .*delete it"):
        train(root, "broken", settings)
    checkpoint.unlink()


def test_it_starts_from_the_targets_own_output(root: Path) -> None:
    folder = train(root, "untrained", training(epochs=1, learning_rate=1e-30))
    drafter = load_redrafter(folder, torch.float32)
    target = load_transformer(root / "model", "cpu")
    hidden, state = torch.randn(2, 5, target.config.hidden_size)
    expected = HEAD_SCALE * target.logits(hidden)[:, drafter.draft_to_target]
    torch.testing.assert_close(drafter.logits(hidden, state), expected, rtol=0.02, atol=0.02)
    rows = output_rows(target, torch.tensor([3, 7]))
    torch.testing.assert_close(hidden @ rows.T, target.logits(hidden)[:, [3, 7]])


def test_the_loss_on_tokens_alone_trains_too(root: Path, uninterrupted: Path) -> None:
    losses = [float(row["loss"]) for row in metrics(train(root, "tokens", training(loss="cross_entropy")), "train")]
    assert losses[-1] < 0.8 * losses[0]
    assert losses != [float(row["loss"]) for row in metrics(uninterrupted, "train")]


@pytest.mark.parametrize("shape", [{"exit_dim": 80}, {"exit_dim": 32}, {"rnn": False}, {"draft_vocab_size": None}])
def test_other_shapes_train(root: Path, shape: dict[str, Any]) -> None:
    stage = training(epochs=2)
    folder = train(root, "shape", stage.model_copy(update={"shape": SHAPE.model_copy(update=shape)}))
    losses = [float(row["loss"]) for row in metrics(folder, "train")]
    assert losses[-1] < losses[0]
    load_redrafter(folder)


def test_two_processes_train_as_one_that_accumulates(root: Path) -> None:
    settings = {"gradient_accumulation": 2, "epochs": 2, "predict_tokens": 2}
    single = train(root, "single", training(**settings))
    double = root / "double"
    stage = training(**settings | {"gradient_accumulation": 1, "num_processes": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [str(Path(sys.executable).with_name("fourfold")), "train-drafter", "--device", "cpu"]
    command += ["--settings", stage.model_dump_json(), "--target", str(root / "model" / "manifest.json")]
    command += ["--data", str(root / "data" / "manifest.json"), "--work", str(root / "work")]
    command += ["--output", str(double / "manifest.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_manifest(double / "manifest.json")["processes"] == 2
    for split in ("train", "heldout"):
        rows = zip(metrics(single, split), metrics(double, split), strict=True)
        for one, two in rows:
            assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-3)
            assert one["step"] == two["step"]


def test_it_trains_alike_where_the_loss_is_captured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches filled up, and the loss in the same buffers every time; gradients of two batches a step."""
    settings = training(gradient_accumulation=2, epochs=2)
    eager, initial = train(root, "eager", settings), Trainer.__init__

    def as_on_a_gpu(self: Trainer, *arguments: Any) -> None:
        initial(self, *arguments)
        self.loss = Uncaptured(self.loss)
        self.train_states.multiple = self.held_out_states.multiple = 32

    monkeypatch.setattr(Trainer, "__init__", as_on_a_gpu)
    captured = train(root, "captured", settings)
    for split in ("train", "heldout"):
        for one, two in zip(metrics(eager, split), metrics(captured, split), strict=True):
            for name in ("loss", "simulated_acceptance_length"):
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3)


def test_unusable_input_is_refused_in_one_line(root: Path) -> None:
    shape = SHAPE.model_copy(update={"draft_vocab_size": 10**6})
    with pytest.raises(FourfoldError, match="1000000 exceeds the model's vocabulary"):
        train(root, "none", training().model_copy(update={"shape": shape}))
    with pytest.raises(FourfoldError, match=r"max_length=3"):
        train(root, "none", training(max_length=3))
    with pytest.raises(FourfoldError, match=r"trackers names wandb, which is not installed"):
        train(root, "none", training(trackers=["wandb"]))
    with write_artifact(root / "foreign" / "manifest.json", stage="x", settings={}) as staging:
        rows = read_jsonl(root / "data" / "train.jsonl")
        rows[3]["token_ids"][1] = 10**6
        write_jsonl(staging.path / "train.jsonl", rows)
        staging.facts = {"end_token_ids": [0]}
    with pytest.raises(FourfoldError, match=r"text id2-1 has token 1000000"):
        train(root, "none", training(), data="foreign")
    assert not (root / "none").exists()
