"""The benchmark of a server that runs already, whoever owns it: loads, client and figures are those of the engines."""

import asyncio
from pathlib import Path
from typing import Any

from fourfold.artifacts.files import write_jsonl
from fourfold.benchmark.bench_serve import bench_serve_record
from fourfold.benchmark.measure import LoadRun, measure
from fourfold.benchmark.run import completions
from fourfold.benchmark.stage import describe, render_prompts, tabulate
from fourfold.benchmark.workload import loads, plan_workloads
from fourfold.client.api import ApiClient
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.problems import Prompt
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer
from fourfold.problems.read import Problem, read_problems
from fourfold.progress import logger


def bench_serve(
    base_url: str,
    problems: Path,
    output: Path,
    settings: BenchmarkSettings,
    *,
    api_key: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Measures a server and writes one line a load, with the field names of `vllm bench serve`.

    Args:
        base_url: the server's address.
        problems: manifest of the problems; the first ones of the benchmark split are asked.
        output: JSONL file to write.
        settings: the loads, and how answers are sampled.
        api_key: the server's key.
        tokenizer: directory of the model's tokenizer; None takes the one that the server names in /v1/models.
    Raises FourfoldError when the server does not answer, or has no tokenizer here.
    """
    asked = read_problems(problems, "benchmark")
    card, measured = asyncio.run(_measure(base_url, asked, settings, api_key, tokenizer))
    _, _, summary = tabulate(card["id"], measured, settings, devices=1)
    records = [
        bench_serve_record(load.runs, line, settings) | {"backend": "openai", "model_id": card["id"]}
        for load, line in zip(measured, summary, strict=True)
    ]
    write_jsonl(output, records)
    for line in summary:
        logger.info("%s", describe(line))


async def _measure(
    base_url: str, asked: list[Problem], settings: BenchmarkSettings, api_key: str | None, tokenizer: Path | None
) -> tuple[dict[str, Any], list[LoadRun]]:
    plans = [plan_workloads(settings, asked, load) for load in loads(settings)]
    async with ApiClient(base_url, api_key) as client:
        card = await client.model_card()
        directory = tokenizer or Path(card.get("root") or "")
        if not directory.is_dir():
            raise FourfoldError(f"{directory}: the server's model is not on this machine; give its --tokenizer")
        prompts = render_prompts(Prompt(), load_tokenizer(directory), asked[: settings.problems])
        return card, await measure(card["id"], client, completions(client, card["id"], prompts), plans, settings)


def parse_goodput(texts: list[str]) -> dict[str, float]:
    """Limits given as `ttft:0.5`, in seconds. Raises FourfoldError."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            raise FourfoldError(f"--goodput {text}: give NAME:SECONDS, like ttft:0.5") from None
    return limits
