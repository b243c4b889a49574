"""A workload with tools: a scripted model behind the real server, the real sandbox, and the rows that come of it."""

import asyncio
from collections.abc import Iterator

import pytest
from sandboxes import bare_policy
from scripted_model import TOKENIZER, scripted_engine
from tiny_server import MODEL, tiny_server

from fourfold.benchmark.run import WorkloadRun, run_workload
from fourfold.benchmark.tables import load_row, request_row
from fourfold.benchmark.tool_calls import sandbox_for, solutions
from fourfold.benchmark.workload import Load, plan_workloads
from fourfold.client.api import ApiClient
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.problems import Prompt
from fourfold.config.tools import ToolSettings
from fourfold.problems.read import Problem

PROBLEM = Problem("p", "Which number is it?", "", "70", "")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[str]:
    bare_policy()
    with sandbox_for(ToolSettings()) as address:
        yield address


def run(script: list[str], sandbox: str, tools: ToolSettings, keep_first: int | None = None) -> WorkloadRun:
    settings = BenchmarkSettings(problems=1, concurrency=[2], max_tokens=600, temperature=0.0, tools=tools)
    (workload,) = plan_workloads(settings, [PROBLEM], Load(concurrency=2))

    async def measured(url: str) -> WorkloadRun:
        async with ApiClient(url) as client:
            ask = solutions(client, MODEL, sandbox, Prompt(), tools, 2048)
            return await run_workload(ask, workload, keep_first)

    with tiny_server(lambda: scripted_engine(script), root=TOKENIZER) as server:
        return asyncio.run(measured(server.url))


def rows(result: WorkloadRun) -> list[dict]:
    return [request_row("e", result, r, lambda text, expected: (text, expected in text)) for r in result.requests]


def test_pauses_are_one_answer_with_its_code(sandbox: str) -> None:
    cell = "<tool_call>\nimport time; time.sleep(0.3); print(35 + 34)\n</tool_call>"
    result = run([cell, "It is 70."], sandbox, ToolSettings())
    for request, row in zip(result.requests, rows(result), strict=True):
        assert row["finish_reason"] == "stop"
        assert (row["code_executions"], row["code_timeouts"]) == (1, 0)
        assert 0.3 <= row["code_execution_time"] < row["e2e_latency"]
        assert "```output\n69\n```" in row["text"]
        # What code printed is no answer, and no token of the model's.
        assert row["answer"] == cell + "It is 70."
        assert row["correct"] is True
        assert row["output_tokens"] == request.answer.times.tokens
        assert 0 < row["ttft"] < row["e2e_latency"] - 0.3
        assert row["prompt_tokens"] > 0
    line = load_row("e", [result], rows(result))
    assert (line["code_executions"], line["code_timeouts"], line["correct"]) == (2, 0, 2)
    assert line["code_execution_time"] == pytest.approx(sum(row["code_execution_time"] for row in rows(result)))


def test_a_call_too_many_and_a_timeout_are_counted(sandbox: str) -> None:
    cell = "<tool_call>\nwhile True: pass\n</tool_call>"
    result = run([cell, cell, "70"], sandbox, ToolSettings(max_code_executions=1, code_execution_timeout=0.5))
    for row in rows(result):
        assert (row["finish_reason"], row["correct"]) == ("length", False)
        assert (row["code_executions"], row["code_timeouts"]) == (1, 1)


def test_a_sandbox_that_is_not_there_fails_the_request() -> None:
    result = run(["<tool_call>\n1\n</tool_call>", "70"], "http://127.0.0.1:9", ToolSettings())
    assert "127.0.0.1:9/execute: the sandbox does not run code" in result.failures[0]
    assert [request.answer.finish_reason for request in result.requests] == ["error"] * 2
