"""A request of the benchmark answered with tools: one answer, however often it paused for code."""

from collections.abc import Iterator
from contextlib import contextmanager

from fourfold.benchmark import metrics
from fourfold.benchmark.run import Ask
from fourfold.benchmark.workload import PlannedRequest
from fourfold.client.api import ApiClient, CodeUse, Completion
from fourfold.config.problems import Prompt
from fourfold.config.tools import ToolSettings
from fourfold.errors import FourfoldError
from fourfold.tools.loop import Solution, solve
from fourfold.tools.run import sandbox_service
from fourfold.tools.sandbox import SandboxSession


@contextmanager
def sandbox_for(tools: ToolSettings | None) -> Iterator[str]:
    """Runs a sandbox while the block runs, if the benchmark has tools; gives its address, or nothing."""
    if tools is None:
        yield ""
        return
    with sandbox_service() as address:
        yield address


def solutions(
    client: ApiClient, model: str, sandbox: str, prompt: Prompt, tools: ToolSettings, max_model_len: int | None
) -> Ask:
    """Asks a server's model in its chat template and runs the code that it writes, each answer in its own session.

    Args:
        client: the server's.
        model: its name there.
        sandbox: the sandbox's address.
        prompt: the wording around a problem; its `user` is all that is sent.
        tools: tags and limits.
        max_model_len: of the server, if known.
    """

    async def ask(planned: PlannedRequest, answer: Completion) -> None:
        solution = Solution()
        problem = prompt.user.replace("{problem}", planned.problem.problem)
        try:
            async with SandboxSession(sandbox) as session:
                await solve(
                    client,
                    model,
                    session,
                    problem,
                    planned.params,
                    tools,
                    solution,
                    max_model_len=max_model_len,
                )
        except FourfoldError as error:
            answer.error = str(error)
        finally:
            # Also of one that was cancelled: what it had written counts.
            take(solution, answer)

    return ask


def take(solution: Solution, answer: Completion) -> None:
    """Makes one answer of a solution's rounds: times while code ran are part of it, its output's tokens are not."""
    rounds = [seen for seen in solution.rounds if seen.times.sent]
    answer.code = CodeUse(
        len(solution.executions), solution.code_execution_time, solution.num_code_timeouts, solution.written
    )
    answer.text = solution.text
    answer.finish_reason = "error" if answer.error else "length" if solution.stop_reason else None
    if solution.stop_reason == "stop":
        answer.finish_reason = "stop"
    if not rounds:
        return
    answer.prompt_tokens = rounds[0].prompt_tokens
    times = answer.times
    times.sent = rounds[0].times.sent
    times.times = [at for seen in rounds for at in seen.times.times]
    times.sizes = [size for seen in rounds for size in seen.times.sizes]
    times.finished = rounds[-1].times.finished if answer.finished else None
    waited = [seen.queue_time for seen in rounds if seen.queue_time is not None]
    answer.queue_time = sum(waited) if waited else None
    answer.speculation = metrics.pool([seen.speculation for seen in rounds])
