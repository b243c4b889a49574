"""What the server costs: time per token over HTTP beside that of the same engine in a process without a server.

The model is the random one of the tests, whose steps take a millisecond: the server has least time for its work there,
and a real model's tokens cost more. Sides alternate, so that a machine whose speed drifts treats both alike.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from fourfold.artifacts import write_artifact
from fourfold.artifacts.provenance import git_commit, library_versions
from fourfold.benchmark import files, metrics
from fourfold.benchmark.added_time import sentence
from fourfold.benchmark.rows import Row, write_csv
from fourfold.client.api import ApiClient, Completion
from fourfold.client.backends import COMMANDS, Served
from fourfold.client.process import free_port, running_server
from fourfold.config.engine import EngineSettings
from fourfold.config.model import TinyModel
from fourfold.engine import LLMEngine, RequestOutput, SamplingParams, load_engine
from fourfold.engine.build import build_engine
from fourfold.errors import FourfoldError
from fourfold.model.stage import fetch_model
from fourfold.progress import logger, progress

CONCURRENCY = 8
NEW_TOKENS = 500
ROUNDS = 4
LIBRARIES = ["torch", "httpx2", "uvicorn", "fastapi"]
ENGINE = EngineSettings(precision="bf16", max_num_seqs=CONCURRENCY, max_model_len=544)
PROMPTS = [[3 + i, *range(40, 71)] for i in range(CONCURRENCY)]
PARAMS = [SamplingParams(max_tokens=NEW_TOKENS, temperature=0.7, seed=i, ignore_eos=True) for i in range(CONCURRENCY)]
Measure = Callable[[], tuple[float, float, list[str]]]
"""Runs all requests: mean time per token and total time, both in seconds, and the texts."""


def measure_overhead(output: Path, device: str, rounds: int = ROUNDS) -> None:
    """Measures both sides, alternated, after a round of each that does not count; writes one CSV row a measurement.

    Args:
        output: manifest to write.
        device: auto, cpu or cuda.
        rounds: measurements of each side.
    Raises FourfoldError when the sides give different texts, or the server fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = build(Path(folder))
        port = free_port()
        command = COMMANDS[ENGINE.backend](Served(directory, port, device, max_waiting=CONCURRENCY))
        with running_server(command, port) as server:
            engine = load_engine(directory, device)
            with write_artifact(
                output,
                stage="measure_overhead",
                settings={"concurrency": CONCURRENCY, "new_tokens": NEW_TOKENS, "rounds": rounds},
                libraries=LIBRARIES,
                device=engine.info["device"],
            ) as staging:
                sides: dict[str, Measure] = {
                    "offline": lambda: offline(engine),
                    "server": lambda: asyncio.run(over_http(server.url)),
                }
                rows = measure(sides, rounds)
                about = {"device": engine.info["device"], **provenance()}
                write_csv(staging.path / files.OVERHEAD, [row | about for row in rows])
    logger.info("%s", sentence(rows))


def build(folder: Path) -> Path:
    """The random model's engine; returns its directory."""
    model, engine = folder / "model" / "manifest.json", folder / "engines" / "tiny" / "manifest.json"
    fetch_model(TinyModel(source="tiny"), model)
    build_engine(ENGINE, model, None, None, engine)
    return engine.parent


def measure(sides: dict[str, Measure], rounds: int) -> list[Row]:
    """One row a measurement. Raises FourfoldError when the sides' texts differ."""
    rows: list[Row] = []
    with progress("overhead", rounds, "rounds") as task:
        for round_ in range(-1, rounds):
            texts = {}
            for side, run in sides.items():
                tpot, seconds, texts[side] = run()
                row: Row = {"side": side, "round": round_, "concurrency": CONCURRENCY, "new_tokens": NEW_TOKENS}
                speed = CONCURRENCY * NEW_TOKENS / seconds
                rows.append(row | {"tpot": tpot, "seconds": seconds, "output_throughput": speed})
            if len(set(map(tuple, texts.values()))) > 1:
                raise FourfoldError("the server's answers are not the engine's; report this with the log")
            if round_ >= 0:
                task.advance()
    return [row for row in rows if row["round"] >= 0]


def offline(engine: LLMEngine) -> tuple[float, float, list[str]]:
    """The requests through the engine in this process."""
    begin = time.perf_counter()
    outputs = engine.generate(PROMPTS, PARAMS)
    return fmean(map(_tpot, outputs)), time.perf_counter() - begin, [o.text for o in outputs]


def _tpot(output: RequestOutput) -> float:
    assert output.first_token_time is not None
    assert output.finished_time is not None
    return (output.finished_time - output.first_token_time) / (len(output.token_ids) - 1)


async def over_http(url: str) -> tuple[float, float, list[str]]:
    """The same requests through a server, each as a stream. Raises FourfoldError when one fails."""
    answers = [Completion() for _ in PROMPTS]
    async with ApiClient(url) as client:
        model = (await client.model_card())["id"]
        begin = time.perf_counter()
        await asyncio.gather(*(client.complete(model, *asked) for asked in zip(PROMPTS, PARAMS, answers, strict=True)))
        seconds = time.perf_counter() - begin
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise FourfoldError(f"the server failed: {failed[0]}")
    tpots = [tpot for answer in answers if (tpot := metrics.tpot(answer.times)) is not None]
    return fmean(tpots), seconds, [answer.text for answer in answers]


def provenance() -> Row:
    """Columns that say what was measured and when."""
    versions = library_versions(LIBRARIES)
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": git_commit(), **versions}
