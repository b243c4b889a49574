"""The workflow's artifacts from a tiny model, made by the real stages: what benchmark and report read."""

import json
from pathlib import Path

import pytest

from fourfold.benchmark.stage import benchmark_engine
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.drafter import DrafterData, DrafterEvaluation, DrafterShape, DrafterTraining
from fourfold.config.engine import EngineSettings
from fourfold.config.model import TinyModel
from fourfold.config.problems import LocalProblems, Prompt, Splits
from fourfold.config.stages import BenchmarkStage, DrafterDataStage, DrafterEvaluationStage, DrafterTrainStage
from fourfold.drafter.data import generate_drafter_data
from fourfold.drafter.evaluate import evaluate_drafter
from fourfold.drafter.train import train_drafter
from fourfold.engine.build import build_engine
from fourfold.model.stage import fetch_model
from fourfold.problems.stage import fetch_problems
from fourfold.tuning.stage import tune_engine

SETTINGS = BenchmarkStage(
    benchmark=BenchmarkSettings(problems=2, concurrency=[1, 3], max_tokens=24, repeats=2), prompt=Prompt()
)


def manifest(folder: Path, name: str) -> Path:
    return folder / name / "manifest.json"


def shared_chain(factory: pytest.TempPathFactory) -> Path:
    """The chain of this test session, with both engines' benchmarks; made once, not to be changed."""
    folder = factory.getbasetemp() / "chain"
    if not folder.exists():
        folder.mkdir()
        make_chain(folder)
        for engine in ("bf16", "bf16-redrafter"):
            benchmark(folder, engine)
    return folder


def make_chain(folder: Path) -> Path:
    """Model, problems, drafter with its evaluation, and the engines `bf16` and `bf16-redrafter` under `folder`."""
    rows = [
        {
            "problem": f"Ada has {a} apples and buys {2 * a + 1} more. How many apples does Ada have now?",
            "solution": f"Ada has {a} + {2 * a + 1} = {3 * a + 1} apples.\n#### {3 * a + 1}",
            "answer": str(3 * a + 1),
            "group": f"template {a % 10}",
        }
        for a in range(2, 82)
    ]
    source = folder / "problems.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, problems = manifest(folder, "model"), manifest(folder, "problems")
    data, drafter, evaluation = (manifest(folder, name) for name in ("data", "drafter", "evaluation"))
    fetch_model(TinyModel(source="tiny"), model)
    fetch_problems(
        LocalProblems(source="local", path=str(source), splits=Splits(train=24, calibration=2, benchmark=3, unseen=2)),
        problems,
    )
    shape, training = DrafterShape(num_draft_layers=1), DrafterTraining(epochs=2, micro_batch_size=4, max_length=128)
    stage = DrafterDataStage(data=DrafterData(source="solutions", problems=24), prompt=Prompt())
    generate_drafter_data(stage, model, problems, folder / "work" / "data", data, "cpu")
    train_drafter(DrafterTrainStage(shape=shape, training=training), model, data, folder / "work", drafter, "cpu")
    judged = DrafterEvaluationStage(
        evaluation=DrafterEvaluation(problems=2, unseen_problems=2, temperatures=[0, 0.5], max_tokens=16),
        prompt=Prompt(),
    )
    evaluate_drafter(judged, model, drafter, problems, evaluation, "cpu")
    row = {"precision": "bf16", "max_num_seqs": 4, "max_model_len": 160}
    build_engine(EngineSettings(**row), model, None, None, manifest(folder, "engines/bf16"))
    tuned = EngineSettings(**row, drafter="redrafter", beam_width="auto", beam_length="auto", draft_min_p="auto")
    tune_engine(tuned, model, drafter, data, manifest(folder, "tuning"), "cpu")
    drafting = EngineSettings(**row, drafter="redrafter", beam_width=2)
    build_engine(drafting, model, drafter, None, manifest(folder, "engines/bf16-redrafter"))
    build_engine(tuned, model, drafter, manifest(folder, "tuning"), manifest(folder, "engines/bf16-tuned"))
    return folder


def benchmark(folder: Path, engine: str, settings: BenchmarkStage = SETTINGS, to: str = "benchmark") -> Path:
    """Runs an engine's benchmark and returns its manifest."""
    output = manifest(folder, f"{to}/{engine}")
    benchmark_engine(settings, manifest(folder, f"engines/{engine}"), manifest(folder, "problems"), output, "cpu")
    return output
