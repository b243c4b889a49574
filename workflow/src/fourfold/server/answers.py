"""Answers to generation calls, whole or as server-sent events, in the two shapes of OpenAI's API."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourfold.engine.logprobs import TokenLogprob
from fourfold.engine.requests import RequestOutput
from fourfold.server.async_engine import Call
from fourfold.server.errors import ApiError
from fourfold.server.logprobs import chat_logprobs, completion_logprobs, token_names
from fourfold.server.text import TextThread
from fourfold.server.tools import CallParser
from fourfold.server.usage import request_metrics, usage


@dataclass
class Wanted:
    """What a call asks for beside text."""

    chat: bool
    model: str
    prompts: int
    num_spec_tokens: int
    logprobs: bool = False
    echoes: list[str] = field(default_factory=list)
    """The prompts' texts, one a prompt, where they shall precede the answers."""
    functions: list[str] = field(default_factory=list)
    """Names of the functions that the model may call, in a chat."""
    usage: bool = False
    """Whether a stream ends with the usage."""
    running_usage: bool = False
    """Whether each of its chunks tells its choice's usage so far, too."""


class Answer:
    """The answer to one call."""

    def __init__(self, call: Call, text: TextThread, wanted: Wanted) -> None:
        self._call, self._text, self._wanted = call, text, wanted
        prefix, kind = ("chatcmpl", "chat.completion") if wanted.chat else ("cmpl", "text_completion")
        self._kind = kind
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
        self._outputs: dict[int, RequestOutput] = {}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [""] * len(self._call.tickets)
        async for number, delta in self._call.collector.deltas():
            texts[number] += delta.text
            if delta.last is not None:
                self._outputs[number] = delta.last
        choices = [await self._choice(number, text, self._outputs[number]) for number, text in enumerate(texts)]
        return {**self._head, "object": self._kind, "choices": choices, **self._closing()}

    async def _choice(self, number: int, text: str, output: RequestOutput) -> dict[str, Any]:
        tokens = output.logprobs
        if self._wanted.echoes:
            text = self._wanted.echoes[number * self._wanted.prompts // len(self._call.tickets)] + text
            tokens = output.prompt_logprobs + tokens
        reason: str | None = output.finish_reason
        body: dict[str, Any] = {"text": text}
        if self._wanted.chat:
            content, calls = (parser := CallParser(self._wanted.functions)).feed(text, ended=True)
            body = {"message": {"role": "assistant", **_said(content, calls, whole=True)}}
            reason = _reason(reason, parser)
        return {
            "index": number,
            **body,
            "logprobs": await self._logprobs(tokens, 0),
            "finish_reason": reason,
            "stop_reason": output.stop_reason,
        }

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, from the first text on, and `[DONE]` after the last."""
        begun = [False] * len(self._call.tickets)
        offsets = [0] * len(self._call.tickets)
        tokens = [0] * len(self._call.tickets)
        parsers = [CallParser(self._wanted.functions) for _ in self._call.tickets]
        kind = "chat.completion.chunk" if self._wanted.chat else self._kind
        head = {**self._head, "object": kind, **({"usage": None} if self._wanted.usage else {})}
        try:
            async for number, delta in self._call.collector.deltas():
                if delta.last is not None:
                    self._outputs[number] = delta.last
                logprobs = await self._logprobs(delta.logprobs, offsets[number])
                reason: str | None = delta.last.finish_reason if delta.last else None
                body: dict[str, Any] = {"text": delta.text}
                if self._wanted.chat:
                    content, calls = parsers[number].feed(delta.text, ended=delta.last is not None)
                    if not (content or calls or delta.last or logprobs):
                        continue  # it may be the beginning of a call
                    role = {} if begun[number] else {"role": "assistant"}
                    body = {"delta": {**role, **_said(content, calls)}}
                    reason = _reason(reason, parsers[number])
                choice = {
                    "index": number,
                    **body,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "stop_reason": delta.last.stop_reason if delta.last else None,
                }
                begun[number] = True
                tokens[number] += len(delta.token_ids)
                if logprobs is not None and not self._wanted.chat:
                    offsets[number] += sum(map(len, logprobs["tokens"]))
                so_far = {"usage": self._so_far(number, tokens[number])} if self._wanted.running_usage else {}
                yield _event({**head, "choices": [choice], **so_far})
            if self._wanted.usage:
                yield _event({**head, "choices": [], **self._closing()})
        except ApiError as error:
            # The status has been sent; this is how OpenAI's clients learn of an error in a stream.
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    async def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self._wanted.logprobs:
            return None
        names = await token_names(self._text, tokens)
        return chat_logprobs(tokens, names) if self._wanted.chat else completion_logprobs(tokens, names, offset)

    def _so_far(self, number: int, tokens: int) -> dict[str, int]:
        read = len(self._call.tickets[number].prompt_token_ids)
        return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}

    def _closing(self) -> dict[str, Any]:
        outputs = [self._outputs[number] for number in range(len(self._call.tickets))]
        return {
            "usage": usage(outputs, self._wanted.prompts),
            "metrics": request_metrics(outputs, self._wanted.num_spec_tokens),
        }


def _said(content: str, calls: list[dict[str, Any]], whole: bool = False) -> dict[str, Any]:
    """What a message says: content, calls, or both. In a whole one, calls have no index."""
    if not calls:
        return {"content": content}
    if whole:
        calls = [{name: value for name, value in call.items() if name != "index"} for call in calls]
    return {"content": content or None, "tool_calls": calls}


def _reason(reason: str | None, parser: CallParser) -> str | None:
    """Why an answer ended, as OpenAI names it when it ended with calls."""
    return "tool_calls" if reason == "stop" and parser.found else reason


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
