"""The drafter's stages on a tiny model: what their tests share."""

import csv
from pathlib import Path
from typing import Any

from fourfold.config.drafter import DrafterData, DrafterShape, DrafterTraining
from fourfold.config.problems import Prompt
from fourfold.config.stages import DrafterDataStage, DrafterTrainStage
from fourfold.drafter.data import generate_drafter_data
from fourfold.drafter.train import train_drafter

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


def metrics(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / "training.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def assert_same_drafter(first: Path, second: Path) -> None:
    for name in ("config.json", "model.safetensors", "draft_vocab.safetensors", "training.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


class Killed(BaseException):
    """Stands for the end of the process."""
