"""The benchmark stage: serves an engine, runs it through the workloads and writes what was measured."""

import asyncio
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fourfold import __version__
from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import write_jsonl
from fourfold.artifacts.provenance import device_name, git_commit, library_versions
from fourfold.benchmark import files
from fourfold.benchmark.answers import extract_answer
from fourfold.benchmark.bench_serve import bench_serve_record
from fourfold.benchmark.checker import AnswerChecker
from fourfold.benchmark.measure import LoadRun, measure
from fourfold.benchmark.rows import write_csv
from fourfold.benchmark.run import completions
from fourfold.benchmark.tables import Row, load_row, request_row, workload_row
from fourfold.benchmark.tool_calls import sandbox_for, solutions
from fourfold.benchmark.workload import Workload, loads, plan_workloads
from fourfold.client.api import ApiClient
from fourfold.client.backends import COMMANDS, Served
from fourfold.client.process import ServerProcess, free_port, running_server
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.engine import EngineSettings
from fourfold.config.problems import Prompt
from fourfold.config.stages import BenchmarkStage
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import resolve_device
from fourfold.problems.read import Problem, read_problems
from fourfold.progress import logger, progress

LIBRARIES = ["torch", "transformers", "math-verify", "sympy"]


def benchmark_engine(settings: BenchmarkStage, engine: Path, problems: Path, output: Path, device: str) -> None:
    """Measures an engine as its clients see it: latency, throughput, acceptance, accuracy.

    Args:
        settings: workload and prompt.
        engine: manifest of the engine; the name of its directory is the engine's name.
        problems: manifest of the problems; the first ones of the benchmark split are asked.
        output: manifest of the benchmark to write.
        device: auto, cpu or cuda.
    Raises FourfoldError, before the server is started, when the engine cannot run the workload; later when the server
    or a request fails.
    """
    name = engine.parent.name
    built = read_manifest(engine, "build_engine")
    row = EngineSettings.model_validate(built["settings"])
    asked = read_problems(problems, "benchmark")
    plans = [plan_workloads(settings.benchmark, asked, load) for load in loads(settings.benchmark)]
    asked = asked[: settings.benchmark.problems]
    prompts = render_prompts(settings.prompt, load_tokenizer(engine.parent), asked)
    check_fits(name, row, settings.benchmark, prompts)
    if settings.benchmark.tools is not None and settings.prompt.system is not None:
        raise FourfoldError("benchmark.tools asks without a system message: set prompt.system to null")

    port = free_port()
    served = Served(
        engine.parent.absolute(),
        port,
        device,
        max_waiting=max(len(workload.requests) for plan in plans for workload in plan),
        # A benchmark's prompts are the same again and again, so they are read each time; with tools, what an answer has
        # before a pause is not read again.
        enable_prefix_caching=settings.benchmark.tools is not None,
    )
    command = COMMANDS[row.backend](served)
    with running_server(command, port) as server, sandbox_for(settings.benchmark.tools) as sandbox:
        card = asyncio.run(read_card(server))
        info = engine_info(row, built["tensor_bytes"], device, server.start_seconds) | card.get("engine", {})
        with write_artifact(
            output,
            stage="benchmark_engine",
            settings=settings.model_dump(),
            inputs={"engine": engine, "problems": problems},
            libraries=LIBRARIES,
            device=info["device"],
        ) as staging:
            staging.facts = {
                "engine": name,
                "engine_settings": row.model_dump(),
                # Facts are the same for the same inputs: times are in the tables.
                "engine_info": {key: value for key, value in info.items() if key != "load_time"},
                "engine_tensor_bytes": built["tensor_bytes"],
                "model": json.loads((engine.parent / "engine.json").read_text(encoding="utf-8"))["model"],
            }
            measured = asyncio.run(measure_server(name, server, card, sandbox, plans, prompts, settings))
            server.stop()
            requests, workloads, summary = tabulate(name, measured, settings.benchmark, row.tensor_parallel_size)
            about = provenance(info)
            closed, rates = (
                [line | about for line in summary if (line["request_rate"] is not None) is open_loop]
                for open_loop in (False, True)
            )
            write_csv(staging.path / files.BENCHMARK, closed)
            write_csv(staging.path / files.RATES, rates)
            write_csv(staging.path / files.WORKLOADS, workloads)
            write_jsonl(staging.path / files.REQUESTS, requests)
            records = [
                bench_serve_record(load.runs, line, settings.benchmark)
                | {"backend": row.backend, "model_id": card["id"]}
                for load, line in zip(measured, summary, strict=True)
            ]
            write_jsonl(staging.path / files.BENCH_SERVE, records)
            write_jsonl(staging.path / files.PROBLEMS, [asdict(problem) for problem in asked])
    for line in summary:
        logger.info("%s", describe(line))


def engine_info(engine: EngineSettings, tensor_bytes: dict[str, int], device: str, load_time: float) -> dict[str, Any]:
    """What is known of an engine whose server does not tell more: see `engine.build.load_engine`."""
    return {
        "precision": engine.precision,
        "drafter": engine.drafter,
        "backend": engine.backend,
        "weight_bytes": tensor_bytes,
        "compute_dtype": "the backend's",
        "device": device_name(str(resolve_device(device))),
        "fp8_emulated": False,
        "load_time": load_time,
    }


async def read_card(server: ServerProcess) -> dict[str, Any]:
    """What the server says of its model."""
    async with ApiClient(server.url) as client:
        return await client.model_card()


async def measure_server(
    name: str,
    server: ServerProcess,
    card: dict[str, Any],
    sandbox: str,
    plans: list[list[Workload]],
    prompts: dict[str, list[int]],
    settings: BenchmarkStage,
) -> list[LoadRun]:
    """Runs the workloads of all loads on a server that was started here, with tools if wanted: see `measure`."""
    tools, length = settings.benchmark.tools, card.get("max_model_len")
    async with ApiClient(server.url) as client:
        ask = completions(client, card["id"], prompts)
        if tools is not None:
            ask = solutions(client, card["id"], sandbox, settings.prompt, tools, length)
        return await measure(name, client, ask, plans, settings.benchmark, server)


def render_prompts(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> dict[str, list[int]]:
    """Prompt token ids by problem id."""
    return {problem.id: render_prompt(tokenizer, prompt, problem.problem) for problem in problems}


def check_fits(name: str, engine: EngineSettings, settings: BenchmarkSettings, prompts: dict[str, list[int]]) -> None:
    """Raises FourfoldError when the engine cannot hold the workload."""
    if engine.backend not in COMMANDS:
        known = " and ".join(COMMANDS)
        raise FourfoldError(
            f"engines.{name}.backend is {engine.backend}: only engines of backend {known} can be benchmarked here"
        )
    most = max(settings.concurrency)
    if most > engine.max_num_seqs:
        raise FourfoldError(
            f"benchmark.concurrency is {most}, but engines.{name}.max_num_seqs is {engine.max_num_seqs}; "
            "raise max_num_seqs or lower the concurrency"
        )
    longest = max(prompts, key=lambda problem: len(prompts[problem]))
    tokens = len(prompts[longest])
    if tokens + settings.max_tokens > engine.max_model_len:
        raise FourfoldError(
            f"benchmark.max_tokens is {settings.max_tokens} and the prompt of problem {longest} has {tokens} tokens, "
            f"but engines.{name}.max_model_len is {engine.max_model_len}; "
            "raise max_model_len or lower max_tokens"
        )


def tabulate(
    name: str, measured: list[LoadRun], settings: BenchmarkSettings, devices: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of requests, of workloads and of loads; judges the answers."""
    requests: list[Row] = []
    workloads: list[Row] = []
    summary: list[Row] = []
    total = sum(request.finished for load in measured for run in load.runs for request in run.requests)
    # All rows have a column for each position that any load drafts.
    drafts = max(
        len(request.answer.speculation.accepted_per_position)
        for load in measured
        for run in load.runs
        for request in run.requests
    )
    with AnswerChecker() as checker, progress(f"score {name}", total, "answers") as task:

        def judge(text: str, expected: str) -> tuple[str | None, bool]:
            task.advance()
            answer = extract_answer(text)
            return answer, checker.same(answer, expected)

        for load in measured:
            rows = [request_row(name, run, request, judge) for run in load.runs for request in run.requests]
            line = load_row(
                name,
                load.runs,
                rows,
                devices=devices,
                max_drafts=drafts,
                goodput=settings.goodput,
            )
            requests += rows
            workloads += [workload_row(name, run) for run in load.runs]
            summary.append(line | {"peak_memory_bytes": load.peak_memory_bytes})
    return requests, workloads, summary


def provenance(info: dict[str, Any]) -> Row:
    """Columns that say what was measured, where and when; the same in every row."""
    versions = library_versions(LIBRARIES)
    return {
        "load_time": info["load_time"],
        "weight_bytes": sum(info["weight_bytes"].values()),
        "precision": info["precision"],
        "drafter": info["drafter"],
        "backend": info["backend"],
        "compute_dtype": info["compute_dtype"],
        "device": info["device"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "fourfold": __version__,
        **{library: versions[library] for library in ("torch", "transformers")},
    }


def describe(line: Row) -> str:
    """One line of a load for the log."""
    load = f"{line['request_rate']:g} requests/s" if line["concurrency"] is None else f"{line['concurrency']} at once"
    parts = [
        f"{line['engine']}, {load}: {line['output_throughput'] or 0:.1f} tok/s",
        f"{line['requests']} requests, {line['cancelled']} cancelled",
    ]
    if line["accuracy"] is not None:
        parts.append(f"{line['correct']} of {line['scored']} right")
    if line["acceptance_length"] is not None:
        parts.append(f"acceptance length {line['acceptance_length']:.2f} (with the bonus token)")
    return "; ".join(parts)
