"""The loop: the model writes until it closes a call, its code runs, the output goes behind it, the model goes on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from fourfold.client.api import ApiClient, Completion
from fourfold.config.tools import ToolSettings
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.tools.plain import quoted
from fourfold.tools.presets import Preset, find_preset
from fourfold.tools.prompt import GrowingPrompt
from fourfold.tools.sandbox import SandboxSession

StopReason = Literal["stop", "length", "max_code_executions"]
Show = Callable[[str, bool], None]
"""Told of each new text, and whether it is output of code rather than written by the model."""
_SEED_STEP = 0x9E3779B9
LOST = "The session was started anew; earlier variables are gone.\n"


@dataclass(frozen=True)
class Execution:
    """A call that was run."""

    code: str
    status: str
    output: str
    """As the model saw it."""
    seconds: float
    """From the request to the sandbox until its answer."""


@dataclass
class Solution:
    """An answer with its calls; filled in as it comes."""

    parts: list[tuple[str, bool]] = field(default_factory=list)
    """What follows the prompt, in order: (text, whether code printed it)."""
    rounds: list[Completion] = field(default_factory=list)
    """The model's completions, one more than there were pauses, as the client saw them."""
    executions: list[Execution] = field(default_factory=list)
    stop_reason: StopReason | None = None
    """None while it comes. `max_code_executions`: the model wrote one call more than may be run."""
    tokens: int = 0
    """Tokens after the prompt, the output blocks' among them."""

    @property
    def text(self) -> str:
        """All that follows the prompt."""
        return "".join(text for text, _ in self.parts)

    @property
    def written(self) -> str:
        """What the model itself wrote: an answer is looked for here, as code could print anything."""
        return "".join(text for text, is_output in self.parts if not is_output)

    @property
    def code_execution_time(self) -> float:
        """Seconds in code, all calls together."""
        return sum(execution.seconds for execution in self.executions)

    @property
    def num_code_timeouts(self) -> int:
        """Calls that ran out of time."""
        return sum(execution.status == "timeout" for execution in self.executions)


async def solve(
    client: ApiClient,
    model: str,
    sandbox: SandboxSession,
    problem: str,
    params: SamplingParams,
    settings: ToolSettings,
    solution: Solution,
    *,
    template: str | None = None,
    max_model_len: int | None = None,
    show: Show = lambda text, is_output: None,
) -> None:
    """Answers a problem and fills `solution` in as the answer comes.

    Works against any server with `/v1/completions` that knows stop strings.

    Args:
        client: the server's.
        model: its name there.
        sandbox: the generation's own session.
        problem: what is asked.
        params: sampling; `max_tokens` bounds the whole, output blocks among it, to the token where the prompt is sent
            as tokens, else up to the last block's length.
        settings: tags and limits.
        solution: filled in.
        template: a text with `{problem}` in it, to be continued; None asks in the model's chat template.
        max_model_len: of the server, if known: a generation ends there with `length` rather than with a refusal.
        show: told of texts as they come.
    Raises FourfoldError when server or sandbox fail.
    """
    preset = find_preset(settings.preset)
    prompt = GrowingPrompt(client, model, preset)
    await prompt.start(problem, template)
    begin: int | None = prompt.length
    # Each round has a seed of its own: servers count a seed's random numbers from the start of a request.
    seed = params.seed % 2**63
    while solution.stop_reason is None:
        left = params.max_tokens - solution.tokens
        if max_model_len is not None and prompt.length is not None:
            left = min(left, max_model_len - prompt.length)
        if left < 1:
            solution.stop_reason = "length"
            return
        asked = replace(params, max_tokens=left, seed=seed, stop=(*params.stop, preset.code_end))
        answer = await _write(client, model, prompt, asked, preset, solution, show)
        begin = answer.prompt_tokens if begin is None else begin
        # Not every server tells the prompt's length, nor any what a block adds before it is read.
        solution.tokens = max(solution.tokens, answer.prompt_tokens - begin) + answer.times.tokens
        code = preset.find_code(answer.text)
        if answer.finish_reason == "length":
            solution.stop_reason = "length"
        elif not _is_closed(answer, code, preset):
            solution.stop_reason = "stop"
        else:
            written = _close(answer.text, preset, solution, show)
            await prompt.add_written(written)
            if code is not None:
                if len(solution.executions) >= settings.max_code_executions:
                    solution.stop_reason = "max_code_executions"
                    return
                output = await _execute(sandbox, code, settings, preset, solution)
                await prompt.add_output(output)
                block = f"{preset.output_begin}{output}{preset.output_end}"
                solution.parts.append((block, True))
                show(block, True)
            if begin is not None and prompt.length is not None:
                solution.tokens = prompt.length - begin
        seed = (seed + _SEED_STEP) % 2**63


async def _write(
    client: ApiClient,
    model: str,
    prompt: GrowingPrompt,
    params: SamplingParams,
    preset: Preset,
    solution: Solution,
    show: Show,
) -> Completion:
    """Lets the model write on, up to its end, a closed call, or the limit."""
    answer = Completion()
    solution.rounds.append(answer)
    solution.parts.append(("", False))

    def grew(text: str) -> None:
        solution.parts[-1] = (answer.text, False)
        show(text, False)

    await client.complete(model, prompt.content, params, answer, grew, preset.body)
    if answer.error is not None:
        raise FourfoldError(f"{client.base_url}/v1/completions: {answer.error}")
    return answer


def _is_closed(answer: Completion, code: str | None, preset: Preset) -> bool:
    """Whether the closing tag ended the text, rather than the model.

    Some servers tell; of others, a text that ends inside of a call is believed to end with the tag.
    """
    if answer.stop_reason is not None:
        return answer.stop_reason == preset.code_end
    return code is not None


def _close(text: str, preset: Preset, solution: Solution, show: Show) -> str:
    """The text with its closing tag, which most servers leave out."""
    if not text.endswith(preset.code_end):
        text += preset.code_end
        solution.parts[-1] = (text, False)
        show(preset.code_end, False)
    return text


async def _execute(
    sandbox: SandboxSession, code: str, settings: ToolSettings, preset: Preset, solution: Solution
) -> str:
    """Runs a call and returns its output as the model shall see it."""
    begin = time.perf_counter()
    cell = await sandbox.run(code, settings.code_execution_timeout, settings.max_code_output_characters)
    seconds = time.perf_counter() - begin
    lost = LOST if cell.new_session and solution.executions else ""
    output = preset.show(cell.status, quoted(cell.stdout), lost + quoted(cell.stderr))
    solution.executions.append(Execution(code, cell.status, output, seconds))
    return output
