"""Stage build_calibration: the texts whose activations set the FP8 scales."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.config.stages import CalibrationStage
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer, render_conversation
from fourfold.problems.read import read_problems
from fourfold.progress import logger

FILE = "data.parquet"


def build_calibration(settings: CalibrationStage, model: Path, problems: Path, output: Path) -> None:
    """Writes `data.parquet` with one column, `text`: problem and solution in the model's own chat template.

    Args:
        settings: how many samples, and the prompt.
        model: manifest of the model, whose tokenizer holds the chat template.
        problems: manifest of the problems; the calibration split is used.
    Raises FourfoldError when there are fewer problems than samples.
    """
    read_manifest(model)
    chosen = read_problems(problems, "calibration")
    samples = settings.calibration.samples
    if len(chosen) < samples:
        raise FourfoldError(
            f"calibration.samples is {samples}, but {problems.parent} holds {len(chosen)} calibration problems; "
            "raise problems.splits.calibration"
        )
    tokenizer = load_tokenizer(model.parent)
    texts = [
        render_conversation(tokenizer, settings.prompt, problem.problem, problem.solution)
        for problem in chosen[:samples]
    ]
    with write_artifact(
        output,
        stage="build_calibration",
        settings=settings.model_dump(),
        inputs={"model": model, "problems": problems},
        libraries=["transformers", "pyarrow"],
    ) as staging:
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), staging.path / FILE)
        staging.facts["samples"] = len(texts)
    logger.info("calibration: %d texts, %d characters", len(texts), sum(map(len, texts)))


def read_texts(calibration: Path) -> list[str]:
    """The calibration texts, in order. Raises FourfoldError when the artifact is cut."""
    read_manifest(calibration)
    texts: list[str] = pq.read_table(calibration.parent / FILE, columns=["text"]).column("text").to_pylist()
    return texts
