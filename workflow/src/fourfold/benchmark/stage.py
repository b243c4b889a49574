"""The benchmark stage: runs an engine through the workloads and writes what was measured."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fourfold import __version__
from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import write_jsonl
from fourfold.artifacts.provenance import git_commit, library_versions
from fourfold.benchmark import files
from fourfold.benchmark.answers import extract_answer
from fourfold.benchmark.checker import AnswerChecker
from fourfold.benchmark.client import OfflineClient
from fourfold.benchmark.memory import peak_bytes, reset_peak
from fourfold.benchmark.rows import write_csv
from fourfold.benchmark.run import WorkloadRun, run_workload
from fourfold.benchmark.tables import Row, concurrency_row, request_row, workload_row
from fourfold.benchmark.workload import PlannedRequest, Workload, plan_workloads
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.engine import EngineSettings
from fourfold.config.stages import BenchmarkStage
from fourfold.engine import LLMEngine, load_engine
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import load_tokenizer, render_prompt
from fourfold.problems.read import Problem, read_problems
from fourfold.progress import logger, progress

LIBRARIES = ["torch", "transformers", "math-verify", "sympy"]
WARMUP_TOKENS = 16
"""Longest answer of a warm-up request."""


def benchmark_engine(settings: BenchmarkStage, engine: Path, problems: Path, output: Path, device: str) -> None:
    """Measures an engine: latency, throughput, acceptance, accuracy.

    Args:
        settings: workload and prompt.
        engine: manifest of the engine; the name of its directory is the engine's name.
        problems: manifest of the problems; the first ones of the benchmark split are asked.
        output: manifest of the benchmark to write.
        device: auto, cpu or cuda.
    Raises FourfoldError, before the engine is loaded, when it cannot run the workload.
    """
    name = engine.parent.name
    built = read_manifest(engine, "build_engine")
    row = EngineSettings.model_validate(built["settings"])
    asked = read_problems(problems, "benchmark")
    plans = {c: plan_workloads(settings.benchmark, asked, c) for c in settings.benchmark.concurrency}
    asked = asked[: settings.benchmark.problems]
    prompts = render_prompts(settings, load_tokenizer(engine.parent), asked)
    check_fits(name, row, settings.benchmark, prompts)

    llm = load_engine(engine.parent, device)
    with write_artifact(
        output,
        stage="benchmark_engine",
        settings=settings.model_dump(),
        inputs={"engine": engine, "problems": problems},
        libraries=LIBRARIES,
        device=llm.info["device"],
    ) as staging:
        staging.facts = {
            "engine": name,
            "engine_settings": row.model_dump(),
            # Facts are the same for the same inputs: times are in the tables.
            "engine_info": {key: value for key, value in llm.info.items() if key != "load_time"},
            "engine_tensor_bytes": built["tensor_bytes"],
            "model": json.loads((engine.parent / "engine.json").read_text(encoding="utf-8"))["model"],
        }
        measured = measure(llm, name, plans, prompts, settings.benchmark)
        requests, workloads, summary = tabulate(name, measured, row, llm.plan.beam_length - 1)
        about = provenance(llm)
        write_jsonl(staging.path / files.REQUESTS, requests)
        write_csv(staging.path / files.WORKLOADS, workloads)
        write_csv(staging.path / files.BENCHMARK, [line | about for line in summary])
        write_jsonl(staging.path / files.PROBLEMS, [asdict(problem) for problem in asked])
    for line in summary:
        logger.info("%s", describe(line))


def render_prompts(
    settings: BenchmarkStage, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> dict[str, list[int]]:
    """Prompt token ids by problem id."""
    return {problem.id: render_prompt(tokenizer, settings.prompt, problem.problem) for problem in problems}


def check_fits(name: str, engine: EngineSettings, settings: BenchmarkSettings, prompts: dict[str, list[int]]) -> None:
    """Raises FourfoldError when the engine cannot hold the workload."""
    if engine.backend != "torch":
        raise FourfoldError(
            f"engines.{name}.backend is {engine.backend}: only engines of backend torch can be benchmarked here"
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


def measure(
    llm: LLMEngine,
    name: str,
    plans: dict[int, list[Workload]],
    prompts: dict[str, list[int]],
    settings: BenchmarkSettings,
) -> dict[int, tuple[list[WorkloadRun], int]]:
    """Runs all workloads; for each concurrency its runs and the peak memory in bytes."""
    client = OfflineClient(llm)
    measured = {}
    device = llm.info["device_type"]
    with progress(f"benchmark {name}", sum(map(len, plans.values())), "workloads") as task:
        for concurrency, workloads in plans.items():
            if settings.warmup_requests:
                # All at once: a batch of another size may take other kernels, or a graph that is not captured yet.
                count = max(settings.warmup_requests, concurrency)
                run_workload(client, warmup(workloads[0], count), prompts)
            reset_peak(device)
            runs = []
            for workload in workloads:
                run = run_workload(client, workload, prompts, settings.keep_first, settings.max_seconds)
                runs.append(run)
                task.advance(1, f"{concurrency} at once, {run.output_tokens / run.total_generation_time:.1f} tok/s")
            measured[concurrency] = (runs, peak_bytes(device))
    return measured


def warmup(workload: Workload, count: int) -> Workload:
    """Requests that resemble a workload's, with short answers."""
    requests = tuple(
        PlannedRequest(
            workload.requests[i % len(workload.requests)].problem,
            i,
            SamplingParams(max_tokens=min(WARMUP_TOKENS, workload.requests[0].params.max_tokens), seed=i),
        )
        for i in range(count)
    )
    return Workload(workload.concurrency, -1, -1, requests)


def tabulate(
    name: str, measured: dict[int, tuple[list[WorkloadRun], int]], engine: EngineSettings, drafts: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of requests, of workloads and of concurrencies; judges the answers. `drafts`: positions that are drafted."""
    requests: list[Row] = []
    workloads: list[Row] = []
    summary: list[Row] = []
    total = sum(request.finished for runs, _ in measured.values() for run in runs for request in run.requests)
    with AnswerChecker() as checker, progress(f"score {name}", total, "answers") as task:

        def judge(text: str, expected: str) -> tuple[str | None, bool]:
            task.advance()
            answer = extract_answer(text)
            return answer, checker.same(answer, expected)

        for runs, peak in measured.values():
            rows = [request_row(name, run, request, judge) for run in runs for request in run.requests]
            line = concurrency_row(name, runs, rows, engine.tensor_parallel_size, drafts)
            requests += rows
            workloads += [workload_row(name, run) for run in runs]
            summary.append(line | {"peak_memory_bytes": peak})
    return requests, workloads, summary


def provenance(llm: LLMEngine) -> Row:
    """Columns that say what was measured, where and when; the same in every row."""
    info: dict[str, Any] = llm.info
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
    """One line of a concurrency for the log."""
    parts = [
        f"{line['engine']}, {line['concurrency']} at once: {line['output_throughput'] or 0:.1f} tok/s",
        f"{line['requests']} requests, {line['cancelled']} cancelled",
    ]
    if line["accuracy"] is not None:
        parts.append(f"{line['correct']} of {line['scored']} right")
    if line["acceptance_length"] is not None:
        parts.append(f"acceptance length {line['acceptance_length']:.2f} (with the bonus token)")
    return "; ".join(parts)
