"""The drafter's stages on a tiny model: data, training, evaluation; killed, resumed, and in two processes."""

import csv
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
from test_drafter_loss import Uncaptured

from fourfold.artifacts import read_manifest, read_provenance, write_artifact
from fourfold.artifacts.files import read_jsonl, write_jsonl
from fourfold.config.drafter import DrafterData, DrafterEvaluation, DrafterShape, DrafterTraining
from fourfold.config.model import TinyModel
from fourfold.config.problems import Prompt
from fourfold.config.stages import DrafterDataStage, DrafterEvaluationStage, DrafterTrainStage
from fourfold.drafter.data import generate_drafter_data
from fourfold.drafter.evaluate import evaluate_drafter
from fourfold.drafter.initial import HEAD_SCALE, output_rows
from fourfold.drafter.journal import Journal
from fourfold.drafter.states import TargetStates
from fourfold.drafter.train import train_drafter
from fourfold.drafter.trainer import Trainer
from fourfold.engine import LLMEngine
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.model.tokenizer import load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import load_redrafter, save_redrafter

PROBLEMS = 14
DATA = DrafterDataStage(
    data=DrafterData(problems=PROBLEMS, samples_per_problem=2, max_tokens=16, max_num_seqs=5, temperature=0.5),
    prompt=Prompt(),
)
SHAPE = DrafterShape(draft_vocab_size=48)
TRAINING = DrafterTraining(epochs=4, micro_batch_size=4, learning_rate=0.01, checkpoint_minutes=1e6)


def training(**changes: Any) -> DrafterTrainStage:
    return DrafterTrainStage(shape=SHAPE, training=TRAINING.model_copy(update=changes))


def problem_rows(count: int, start: int) -> list[dict[str, str]]:
    rows = []
    for n in range(start, start + count):
        text = f"Ann has {n} apples and buys {n + 3} more. How many apples has she?"
        solution = f"{n} + {n + 3} = {2 * n + 3}\n#### {2 * n + 3}"
        rows.append({"id": f"id{n}", "problem": text, "solution": solution, "answer": str(2 * n + 3), "group": ""})
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, problems and training data, as artifacts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("drafter")
    fetch_model(TinyModel(source="tiny"), folder / "model" / "manifest.json")
    with write_artifact(folder / "problems" / "manifest.json", stage="fetch_problems", settings={}) as staging:
        write_jsonl(staging.path / "train.jsonl", problem_rows(PROBLEMS, 1))
        write_jsonl(staging.path / "benchmark.jsonl", problem_rows(3, 50))
        write_jsonl(staging.path / "unseen.jsonl", problem_rows(2, 70))
    make_data(folder, "data")
    return folder


def make_data(root: Path, name: str, settings: DrafterDataStage = DATA, work: str = "work") -> Path:
    output = root / name / "manifest.json"
    model, problems = root / "model" / "manifest.json", root / "problems" / "manifest.json"
    generate_drafter_data(settings, model, problems, root / work, output, "cpu")
    return output


def train(root: Path, name: str, settings: DrafterTrainStage, data: str = "data") -> Path:
    output = root / name / "manifest.json"
    train_drafter(
        settings, root / "model" / "manifest.json", root / data / "manifest.json", root / "work", output, "cpu"
    )
    return output.parent


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Path:
    return train(root, "uninterrupted", training())


def metrics(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / "training.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def assert_same_drafter(first: Path, second: Path) -> None:
    for name in ("config.json", "model.safetensors", "draft_vocab.safetensors", "training.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


class Killed(BaseException):
    """Stands for the end of the process."""


class TestData:
    def test_answers_are_rows_in_the_order_of_problems_and_samples(self, root: Path) -> None:
        rows = read_jsonl(root / "data" / "train.jsonl")
        assert [row["id"] for row in rows] == [f"id{n}-{s}" for n in range(1, PROBLEMS + 1) for s in range(2)]
        manifest = read_manifest(root / "data" / "manifest.json")
        ends = set(manifest["end_token_ids"])
        tokenizer = load_tokenizer(root / "model")
        for row, problem in zip(rows[::2], problem_rows(PROBLEMS, 1), strict=True):
            assert row["prompt_token_ids"] == render_prompt(tokenizer, Prompt(), problem["problem"])
        for row in rows:
            assert 1 <= len(row["token_ids"]) <= 16
            assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] in ends)
            assert not ends & set(row["token_ids"][:-1])
        assert manifest["answer_tokens"] == sum(len(row["token_ids"]) for row in rows)
        assert rows[0]["token_ids"] != rows[1]["token_ids"], "samples of a problem have seeds of their own"
        assert not list((root / "work").glob("answers-*")), "the journal is gone once its answers are written"

    def test_a_killed_generation_resumes_to_the_same_bytes(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        append, written = Journal.append, itertools.count(1)

        def append_and_die(self: Journal, row: dict[str, Any]) -> None:
            append(self, row)
            if next(written) == 9:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", append_and_die)
            with pytest.raises(Killed):
                make_data(root, "resumed")
        assert not (root / "resumed").exists()
        (journal,) = (root / "work").glob("answers-*.jsonl")
        assert len(read_jsonl(journal)) == 9
        with journal.open("a") as file:
            file.write('{"id": "id7-0", "tok')  # the line that the kill tore
        appended = []
        monkeypatch.setattr(Journal, "append", lambda self, row: (appended.append(row["id"]), append(self, row)))
        make_data(root, "resumed")
        assert len(appended) == 2 * PROBLEMS - 9, "finished answers are not generated again"
        for name in ("train.jsonl", "manifest.json"):
            assert (root / "resumed" / name).read_bytes() == (root / "data" / name).read_bytes()

    def test_the_batch_does_not_change_an_answer(self, root: Path) -> None:
        alone = DATA.model_copy(update={"data": DATA.data.model_copy(update={"max_num_seqs": 1})})
        make_data(root, "alone", alone)
        assert (root / "alone" / "train.jsonl").read_bytes() == (root / "data" / "train.jsonl").read_bytes()

    def test_prompts_that_are_read_together_change_no_answer(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fourfold.drafter.data.READ_SHARE", 2)
        waiting = []
        step = LLMEngine.step
        monkeypatch.setattr(LLMEngine, "step", lambda self: (waiting.append(self.num_waiting), step(self))[1])
        make_data(root, "together")
        assert (root / "together" / "train.jsonl").read_bytes() == (root / "data" / "train.jsonl").read_bytes()
        assert waiting.count(1) <= 2, "two of five slots are free before prompts are read, but for the last"

    def test_solutions_follow_the_same_prompt_and_end_with_end_of_text(self, root: Path) -> None:
        settings = DATA.model_copy(update={"data": DrafterData(source="solutions", problems=3)})
        manifest = read_manifest(make_data(root, "solutions", settings))
        rows = read_jsonl(root / "solutions" / "train.jsonl")
        generated = read_jsonl(root / "data" / "train.jsonl")
        tokenizer = load_tokenizer(root / "model")
        assert len(rows) == 3
        for row, other, problem in zip(rows, generated[::2], problem_rows(PROBLEMS, 1), strict=False):
            assert row["prompt_token_ids"] == other["prompt_token_ids"]
            assert row["token_ids"][-1] in manifest["end_token_ids"]
            assert tokenizer.decode(row["token_ids"][:-1]).strip() == problem["solution"]
            assert row["finish_reason"] == "stop"
        assert read_provenance(root / "solutions" / "manifest.json")["device"] is None, "nothing was computed"

    def test_too_few_problems_are_refused(self, root: Path) -> None:
        settings = DATA.model_copy(update={"data": DrafterData(problems=PROBLEMS + 1)})
        with pytest.raises(FourfoldError, match=r"drafter\.data\.problems is 15, but the train split holds 14"):
            make_data(root, "none", settings)


class TestTraining:
    def test_it_learns_and_keeps_the_best_epoch(self, root: Path, uninterrupted: Path) -> None:
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

    def test_the_draft_vocabulary_can_end_the_text(self, root: Path, uninterrupted: Path) -> None:
        drafter = load_redrafter(uninterrupted)
        ends = read_manifest(root / "data" / "manifest.json")["end_token_ids"]
        assert drafter.draft_to_target is not None
        assert set(ends) <= set(drafter.draft_to_target.tolist())
        assert json.loads((uninterrupted / "config.json").read_text())["vocab_size"] > 48

    @pytest.mark.parametrize("step", [1, 5, 6, 13, 20])
    def test_a_killed_training_resumes_to_the_same_bits(
        self, root: Path, uninterrupted: Path, step: int, monkeypatch: pytest.MonkeyPatch
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
        self, root: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
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
        self, root: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        initial = TargetStates.__init__
        monkeypatch.setattr(
            TargetStates, "__init__", lambda self, target, groups: initial(self, target, groups, 20_000)
        )
        assert_same_drafter(train(root, "forgetful", training()), uninterrupted)

    def test_a_broken_checkpoint_is_named(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_it_starts_from_the_targets_own_output(self, root: Path) -> None:
        folder = train(root, "untrained", training(epochs=1, learning_rate=1e-30))
        drafter = load_redrafter(folder, torch.float32)
        target = load_transformer(root / "model", "cpu")
        hidden, state = torch.randn(2, 5, target.config.hidden_size)
        expected = HEAD_SCALE * target.logits(hidden)[:, drafter.draft_to_target]
        torch.testing.assert_close(drafter.logits(hidden, state), expected, rtol=0.02, atol=0.02)
        rows = output_rows(target, torch.tensor([3, 7]))
        torch.testing.assert_close(hidden @ rows.T, target.logits(hidden)[:, [3, 7]])

    def test_the_loss_on_tokens_alone_trains_too(self, root: Path, uninterrupted: Path) -> None:
        losses = [float(row["loss"]) for row in metrics(train(root, "tokens", training(loss="cross_entropy")), "train")]
        assert losses[-1] < 0.8 * losses[0]
        assert losses != [float(row["loss"]) for row in metrics(uninterrupted, "train")]

    @pytest.mark.parametrize("shape", [{"exit_dim": 80}, {"exit_dim": 32}, {"rnn": False}, {"draft_vocab_size": None}])
    def test_other_shapes_train(self, root: Path, shape: dict[str, Any]) -> None:
        stage = training(epochs=2)
        folder = train(root, "shape", stage.model_copy(update={"shape": SHAPE.model_copy(update=shape)}))
        losses = [float(row["loss"]) for row in metrics(folder, "train")]
        assert losses[-1] < losses[0]
        load_redrafter(folder)

    def test_two_processes_train_as_one_that_accumulates(self, root: Path) -> None:
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

    def test_it_trains_alike_where_the_loss_is_captured(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_unusable_input_is_refused_in_one_line(self, root: Path) -> None:
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


class TestEvaluation:
    def evaluate(self, root: Path, drafter: Path, name: str = "evaluation", **changes: Any) -> Path:
        values = {"problems": 3, "max_tokens": 24, "max_num_seqs": 2} | changes
        settings = DrafterEvaluationStage(evaluation=DrafterEvaluation(**values), prompt=Prompt())
        output = root / name / "manifest.json"
        evaluate_drafter(
            settings, root / "model" / "manifest.json", drafter / "manifest.json",
            root / "problems" / "manifest.json", output, "cpu",
        )  # fmt: skip
        return output.parent

    def test_rows_add_up_to_the_summary(self, root: Path, uninterrupted: Path) -> None:
        folder = self.evaluate(root, uninterrupted)
        with (folder / "acceptance.csv").open() as file:
            rows = list(csv.DictReader(file))
        with (folder / "summary.csv").open() as file:
            (summary,) = csv.DictReader(file)
        assert [row["problem_id"] for row in rows] == ["id50", "id51", "id52"]
        for name in ("output_tokens", "drafts", "draft_tokens", "accepted", "accepted_0", "accepted_1", "accepted_2"):
            assert int(summary[name]) == sum(int(row[name]) for row in rows), name
        drafts, accepted = int(summary["drafts"]), int(summary["accepted"])
        assert drafts > 0
        assert accepted == sum(int(summary[f"accepted_{i}"]) for i in range(3))
        assert float(summary["acceptance_length"]) == pytest.approx(1 + accepted / drafts, rel=1e-5)
        assert int(summary["draft_tokens"]) == 3 * drafts
        assert read_manifest(folder / "manifest.json")["acceptance"]["counts_bonus_token"] is True

    def test_seen_and_unseen_groups_are_counted_apart_at_each_temperature(
        self, root: Path, uninterrupted: Path
    ) -> None:
        folder = self.evaluate(root, uninterrupted, "kinds", unseen_problems=2, temperatures=[0, 0.7])
        with (folder / "acceptance.csv").open() as file:
            rows = list(csv.DictReader(file))
        with (folder / "summary.csv").open() as file:
            summary = list(csv.DictReader(file))
        kinds = [("seen", "0"), ("unseen", "0"), ("seen", "0.7"), ("unseen", "0.7")]
        assert [(row["groups"], row["temperature"]) for row in summary] == kinds
        ids = {"seen": ["id50", "id51", "id52"], "unseen": ["id70", "id71"]}
        for kind, line in zip(kinds, summary, strict=True):
            own = [row for row in rows if (row["groups"], row["temperature"]) == kind]
            assert [row["problem_id"] for row in own] == ids[kind[0]]
            assert int(line["problems"]) == len(own)
            for name in ("output_tokens", "drafts", "accepted"):
                assert int(line[name]) == sum(int(row[name]) for row in own), name
        greedy = self.evaluate(root, uninterrupted, "greedy")
        first = (greedy / "acceptance.csv").read_text().splitlines()
        assert (folder / "acceptance.csv").read_text().splitlines()[: len(first)] == first

    def test_evaluation_is_reproducible(self, root: Path, uninterrupted: Path) -> None:
        values = {"problems": 2, "temperatures": [0.7]}
        first, second = (self.evaluate(root, uninterrupted, name, **values) for name in ("once", "again"))
        for name in ("acceptance.csv", "summary.csv", "manifest.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()

    def test_a_drafter_of_another_model_is_refused(self, root: Path, uninterrupted: Path) -> None:
        drafter = load_redrafter(uninterrupted)
        manifest = root / "other" / "manifest.json"
        with write_artifact(manifest, stage="train_drafter", settings={}) as staging:
            save_redrafter(drafter, staging.path)
            config = json.loads((staging.path / "config.json").read_text())
            (staging.path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
            staging.facts = {"predict_tokens": 3}
        with pytest.raises(FourfoldError, match="the drafter's vocab_size is"):
            self.evaluate(root, manifest.parent)

    def test_too_few_problems_are_refused(self, root: Path, uninterrupted: Path) -> None:
        with pytest.raises(FourfoldError, match=r"drafter\.evaluation\.problems is 4, but the benchmark split holds 3"):
            self.evaluate(root, uninterrupted, problems=4)
        with pytest.raises(FourfoldError, match=r"unseen_problems is 3, but the unseen split holds 2"):
            self.evaluate(root, uninterrupted, unseen_problems=3)
