"""Stage fetch_problems: problems with worked solutions, divided into train, calibration, benchmark and unseen."""

from dataclasses import asdict
from pathlib import Path

from fourfold.artifacts import write_artifact
from fourfold.artifacts.files import write_jsonl
from fourfold.config.problems import HubProblems, LocalProblems, ProblemsSettings
from fourfold.problems.rows import divide
from fourfold.problems.sources import hub_revision, source_rows
from fourfold.progress import logger


def fetch_problems(settings: ProblemsSettings, output: Path) -> None:
    """Writes `train.jsonl`, `calibration.jsonl`, `benchmark.jsonl` and `unseen.jsonl`.

    Rows: id, problem, solution, answer, group. A hash of the problem's text alone decides its split, and the order
    inside it; a hash of the group decides what is unseen (nothing if no unseen problems are asked for). Raises
    FourfoldError when the source cannot be had or gives too few problems.
    """
    source = Path(settings.path).expanduser() if isinstance(settings, LocalProblems) else None
    inputs = {"source": source} if source is not None and source.is_file() else {}
    with write_artifact(
        output, stage="fetch_problems", settings=settings.model_dump(), inputs=inputs, libraries=["datasets"]
    ) as staging:
        if isinstance(settings, HubProblems):
            settings = settings.model_copy(update={"revision": hub_revision(settings)})
            staging.facts["revision"] = settings.revision
        splits = divide(source_rows(settings), settings.splits)
        for split, problems in splits.items():
            write_jsonl(staging.path / f"{split}.jsonl", [asdict(problem) for problem in problems])
        staging.facts["problems"] = {split: len(problems) for split, problems in splits.items()}
    logger.info("problems: %s", ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))
