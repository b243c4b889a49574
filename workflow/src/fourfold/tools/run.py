"""`fourfold solve`: a problem, a server, a sandbox; what is not running is started for as long as it is needed."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fourfold.artifacts import read_manifest
from fourfold.client.api import ApiClient
from fourfold.client.backends import COMMANDS, Served
from fourfold.client.process import free_port, running_server
from fourfold.config.engine import EngineSettings
from fourfold.config.tools import ToolSettings
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.progress import logger
from fourfold.tools.loop import Show, Solution, solve
from fourfold.tools.plain import printable
from fourfold.tools.sandbox import SandboxSession


@contextmanager
def engine_server(engine: Path, device: str = "auto", max_waiting: int = 512) -> Iterator[str]:
    """Serves an engine directory while the block runs; gives the address. Raises FourfoldError."""
    built = read_manifest(engine / "manifest.json", "build_engine")
    backend = EngineSettings.model_validate(built["settings"]).backend
    port = free_port()
    command = COMMANDS[backend](Served(engine.absolute(), port, device, max_waiting, enable_prefix_caching=True))
    logger.info("serving %s", engine)
    with running_server(command, port) as server:
        yield server.url


@contextmanager
def sandbox_service() -> Iterator[str]:
    """Runs a sandbox while the block runs; gives the address. Raises FourfoldError where it cannot isolate."""
    port = free_port()
    logger.info("starting a sandbox")
    with running_server([sys.executable, "-m", "fourfold.cli", "sandbox", "--port", str(port)], port) as service:
        yield service.url


async def solve_some(
    server: str,
    sandbox: str,
    problem: str,
    params: SamplingParams,
    settings: ToolSettings,
    *,
    model: str | None = None,
    template: str | None = None,
    generations: int = 1,
    keep_first: int | None = None,
    max_seconds: float | None = None,
    api_key: str | None = None,
    sandbox_api_key: str | None = None,
    show: Show = lambda text, is_output: None,
) -> list[Solution]:
    """Answers a problem several times at once; generation i has seed params.seed + i and a session of its own.

    Args:
        server, sandbox: their addresses.
        problem, params, settings, template: as for `solve`.
        model: its name at the server; None takes the first that is served.
        generations: answers to begin.
        keep_first: stop when this many have ended; None waits for all.
        max_seconds: stop after this long.
        api_key, sandbox_api_key: bearer tokens.
        show: told of the texts of the first generation.
    Returns those that ended, in the order in which they did; the others are cancelled.
    Raises FourfoldError when server or sandbox fail.
    """
    async with ApiClient(server, api_key) as client:
        card = await client.model_card()
        name = model or str(card["id"])

        async def answer(number: int) -> Solution:
            solution = Solution()
            async with SandboxSession(sandbox, sandbox_api_key) as session:
                await solve(
                    client,
                    name,
                    session,
                    problem,
                    replace(params, seed=params.seed + number),
                    settings,
                    solution,
                    template=template,
                    max_model_len=card.get("max_model_len"),
                    show=(lambda text, is_output: None) if number else show,
                )
            return solution

        return await first_ended([answer(i) for i in range(generations)], keep_first, max_seconds)


async def first_ended(
    answers: list[Awaitable[Solution]], keep_first: int | None, max_seconds: float | None
) -> list[Solution]:
    """Runs all at once; returns the first that end, and cancels the others. Raises what any of them raises."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    ended: list[Solution] = []
    try:
        for task in asyncio.as_completed(tasks, timeout=max_seconds):
            ended.append(await task)
            if len(ended) == keep_first:
                break
    except TimeoutError:
        pass
    finally:
        for left in tasks:
            left.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return ended


def print_solution(
    server: str,
    sandbox: str,
    problem: str,
    params: SamplingParams,
    settings: ToolSettings,
    *,
    prompt: Path | None,
    generations: int,
    keep_first: int | None,
    max_seconds: float | None,
    model: str | None,
    api_key: str | None,
    sandbox_api_key: str | None,
    output: Path | None,
) -> None:
    """Answers a problem and prints the text as it comes, code's output dimmed, and then what it took.

    Of several generations the first is printed as it comes, the others when all is done; `output` is a JSON file for
    all of them. `prompt` is a text file with `{problem}` in it, to be continued; None asks in the chat template. The
    rest is as for `solve_some`.
    """
    console = Console(highlight=False, soft_wrap=True)

    def show(text: str, is_output: bool) -> None:
        console.print(Text(printable(text), style="dim" if is_output else ""), end="")

    template = None if prompt is None else _read_template(prompt)
    begin = time.perf_counter()
    solutions = asyncio.run(
        solve_some(
            server,
            sandbox,
            problem,
            params,
            settings,
            model=model,
            template=template,
            generations=generations,
            keep_first=keep_first,
            max_seconds=max_seconds,
            api_key=api_key,
            sandbox_api_key=sandbox_api_key,
            show=show if generations == 1 else lambda text, is_output: None,
        )
    )
    seconds = time.perf_counter() - begin
    for number, solution in enumerate(solutions, start=1):
        if generations > 1:
            console.rule(f"{number} of {generations}")
            for text, is_output in solution.parts:
                show(text, is_output)
        console.print()
        logger.info("%s", summary(solution))
    logger.info("%d of %d generations ended in %.1f s", len(solutions), generations, seconds)
    if output is not None:
        output.write_text(json.dumps([record(s) for s in solutions], indent=2, ensure_ascii=False) + "\n", "utf-8")


def record(solution: Solution) -> dict[str, object]:
    """A solution as plain values, under NeMo-Skills' names where it has one."""
    return {
        "generation": solution.text,
        "written": solution.written,
        "stop_reason": solution.stop_reason,
        "num_generated_tokens": sum(answer.times.tokens for answer in solution.rounds),
        "code_rounds_executed": len(solution.executions),
        "code_execution_time": solution.code_execution_time,
        "num_code_timeouts": solution.num_code_timeouts,
        "executions": [vars(execution) for execution in solution.executions],
    }


def summary(solution: Solution) -> str:
    """What an answer took, in one line."""
    tokens = sum(answer.times.tokens for answer in solution.rounds)
    return (
        f"{tokens} tokens, {len(solution.executions)} executions ({solution.code_execution_time:.2f} s in code, "
        f"{solution.num_code_timeouts} timed out), ended by {solution.stop_reason}"
    )


def _read_template(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if "{problem}" not in text:
        raise FourfoldError(f"{path}: does not contain {{problem}}, where the problem goes; add it")
    return text
