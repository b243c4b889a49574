"""The two generation calls: from a body to the requests of the engine, and to the answer."""

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from fourfold.engine import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.server.answers import Answer, Wanted
from fourfold.server.disconnect import ClientGone, until_disconnect
from fourfold.server.errors import bad_request
from fourfold.server.protocol import ChatBody, CompletionBody, GenerationBody
from fourfold.server.service import Service
from fourfold.server.tools import Tool, knows_tools

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI's and vLLM's."""
MIN_TEMPERATURE = 0.01
"""A lower temperature than this, which has no place among float32 probabilities, is raised to it, as in vLLM."""
CLIENT_GONE = 499
"""What nobody reads; the number is nginx's."""


class EventStream(Response):
    """Server-sent events, until they or the client end; calls `close` then."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self._events, self._close = events, close
        # Proxies that know the second header pass each event on at once.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await until_disconnect(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def completions(service: Service, body: CompletionBody, request: Request) -> Response:
    """Continues texts. Raises ApiError."""
    service.check_model(body.model)
    if body.echo and body.stream:
        raise bad_request("echo: is not supported in a stream", "echo")
    text = service.engine.text
    prompts, echoes = [], []
    for prompt in _prompts(body):
        prompts.append(await text.encode(prompt) if isinstance(prompt, str) else prompt)
        if body.echo:
            echoes.append(prompt if isinstance(prompt, str) else await _known_text(service, prompt))
    params = _params(
        body,
        max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    wanted = _wanted(service, body, prompts=len(prompts), chat=False, logprobs=body.logprobs is not None)
    wanted.echoes = echoes
    return await _answer(service, request, body, prompts, params, wanted, "prompt")


async def chat(service: Service, body: ChatBody, request: Request) -> Response:
    """Answers a conversation. Raises ApiError."""
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
    tools = _tools(service, body)
    shown = [tool.model_dump(exclude_none=True) for tool in tools] or None
    messages = [message.plain() for message in body.messages]
    prompt = await service.engine.text.encode_chat(messages, tools=shown)
    # Without a limit of its own an answer may be as long as there is room.
    room = max(1, service.engine.engine.max_model_len - len(prompt))
    params = _params(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens or room,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    wanted = _wanted(service, body, prompts=1, chat=True, logprobs=bool(body.logprobs))
    wanted.functions = [tool.function.name for tool in tools]
    return await _answer(service, request, body, [prompt], params, wanted, "messages")


def _tools(service: Service, body: ChatBody) -> list[Tool]:
    """The functions that the model may call. Raises ApiError when its chat template knows none."""
    if not body.tools or body.tool_choice == "none":
        return []
    if not knows_tools(service.engine.text.chat_template):
        raise bad_request("tools: the model's chat template knows no tools; leave them out", "tools")
    if body.parallel_tool_calls is False:
        raise bad_request("parallel_tool_calls: false is not supported with tools; leave it out", "parallel_tool_calls")
    return body.tools


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts, one or several, each a text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


async def _known_text(service: Service, token_ids: list[int]) -> str:
    """The text of a prompt's tokens, where the vocabulary has them; the engine refuses the others."""
    known = [token for token in token_ids if token < service.engine.engine.target.config.vocab_size]
    return await service.engine.text.decode(known)


def _params(
    body: GenerationBody, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The engine's parameters. Without a seed, each call has another."""
    temperature = 1.0 if body.temperature is None else body.temperature
    given = {
        "top_p": body.top_p,
        "min_p": body.min_p,
        "stop": tuple(body.stop),
        "ignore_eos": body.ignore_eos,
        "skip_special_tokens": body.skip_special_tokens,
    }
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=max(temperature, MIN_TEMPERATURE) if temperature else 0.0,
            top_k=max(0, body.top_k or 0),
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
    except FourfoldError as error:
        raise bad_request(str(error), str(error).split(":")[0]) from None


def _wanted(service: Service, body: GenerationBody, *, prompts: int, chat: bool, logprobs: bool) -> Wanted:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: needs stream to be true", "stream_options")
    return Wanted(
        chat=chat,
        model=service.model,
        prompts=prompts,
        num_spec_tokens=service.engine.engine.plan.beam_length - 1,
        logprobs=logprobs,
        usage=(options := body.stream_options) is not None and options.include_usage,
        running_usage=options is not None and options.include_usage and options.continuous_usage_stats,
    )


async def _answer(
    service: Service,
    request: Request,
    body: GenerationBody,
    prompts: list[list[int]],
    params: SamplingParams,
    wanted: Wanted,
    field: str,
) -> Response:
    """Hands in the requests, `n` a prompt with seeds that follow each other, and answers."""
    requests = [
        (prompt, replace(params, seed=params.seed + choice)) for prompt in prompts for choice in range(body.n or 1)
    ]
    call = service.engine.submit(requests, field)
    answer = Answer(call, service.engine.text, wanted)
    if body.stream:
        return EventStream(answer.events(), call.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, answer.whole()))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        call.close()
