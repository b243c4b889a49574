"""A client of OpenAI's completions API that notes when each token came: one for every backend."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from fourfold.client.http import Refused, describe, http_client
from fourfold.client.times import RequestTimes
from fourfold.engine.requests import SamplingParams, SpeculationStats
from fourfold.errors import FourfoldError


@dataclass(frozen=True)
class CodeUse:
    """What an answer made of its tools."""

    executions: int
    seconds: float
    """In code, all executions together."""
    timeouts: int
    written: str
    """The text without what code printed: an answer is looked for here, as code could print anything."""


@dataclass
class Completion:
    """What a client has of an answer so far."""

    times: RequestTimes = field(default_factory=RequestTimes)
    prompt_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    """None while it comes; `cancelled` if it was stopped; `error` if it failed."""
    stop_reason: int | str | None = None
    """The stop string or token that ended it, if one did and the server tells."""
    error: str | None = None
    queue_time: float | None = None
    """Seconds that it waited for a slot, if the server tells."""
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    """Drafts, if the server tells; known at the end of an answer only."""
    code: CodeUse | None = None
    """None without tools."""

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason in ("stop", "length")


class ApiClient:
    """Asks one server. A context manager; `complete` may run many times at once."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            base_url: the server's address, without `/v1`.
            api_key: sent as a bearer token.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._http = http_client(self.base_url, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def model_card(self) -> dict[str, Any]:
        """The first model of /v1/models. Raises FourfoldError when the server does not answer as it should."""
        try:
            response = await self._http.get("/v1/models")
            card: dict[str, Any] = response.raise_for_status().json()["data"][0]
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(
                f"{self.base_url}/v1/models: no model is served there ({describe(error)}); check the address"
            ) from None
        return card

    async def metric(self, name: str) -> float | None:
        """A value of /metrics without labels of its own; None where the server has none of that name."""
        response = await self._http.get("/metrics")
        for line in response.text.splitlines() if response.is_success else ():
            if line.startswith((f"{name}{{", f"{name} ")):
                return float(line.rpartition(" ")[2])
        return None

    async def tokenize(self, model: str, **body: Any) -> list[int] | None:
        """Token ids of a `prompt`, or of `messages` in the model's chat template; None where there is no /tokenize.

        Raises FourfoldError when the server refuses.
        """
        try:
            response = await self._http.post("/tokenize", json={"model": model, **body})
            if response.status_code in (404, 405, 501):
                return None
            if not response.is_success:
                raise Refused(f"{response.status_code}: {_message(response.text)}")
            return [int(token) for token in response.json()["tokens"]]
        except (httpx2.HTTPError, Refused, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(f"{self.base_url}/tokenize: {describe(error)}") from None

    async def complete(
        self,
        model: str,
        prompt: str | list[int],
        params: SamplingParams,
        answer: Completion,
        on_text: Callable[[str], None] | None = None,
        further: Mapping[str, Any] = {},
    ) -> None:
        """Asks for the answer to a text or token ids and fills `answer` in as it comes.

        A server that refuses or fails leaves an `error` in it; nothing is raised. Cancelled, it closes the connection.

        Args:
            model: its name there.
            prompt: what is continued.
            params: as many of them as are sent: up to `stop`.
            answer: filled in.
            on_text: called with each new piece of text.
            further: fields of the body that only some servers know.
        """
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "ignore_eos": params.ignore_eos,
            **({"stop": list(params.stop)} if params.stop else {}),
            **further,
            "stream": True,
            # vLLM's and TensorRT-LLM's: each chunk tells how many tokens there are.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        # Of a text, the server tells at the end.
        answer.prompt_tokens = len(prompt) if isinstance(prompt, list) else 0
        answer.times.sent = time.perf_counter()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise Refused(f"{response.status_code}: {_message(response.text)}")
                async for event in _events(response):
                    known = len(answer.text)
                    _take(event, time.perf_counter(), answer)
                    if on_text is not None and len(answer.text) > known:
                        on_text(answer.text[known:])
            if answer.finish_reason is None:
                raise Refused("the stream ended without an end of the answer")
        except (httpx2.HTTPError, Refused, ValueError, LookupError, TypeError) as error:
            answer.finish_reason, answer.times.finished, answer.error = "error", None, describe(error)


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            # Other lines are empty, or comments that keep a connection alive.
            if line.startswith(b"data:") and (content := line[5:].strip()) != b"[DONE]":
                yield json.loads(content)


def _take(event: dict[str, Any], now: float, answer: Completion) -> None:
    """Adds an event to an answer. Raises Refused for one that tells of an error."""
    if "error" in event:
        raise Refused(_message(json.dumps(event)))
    usage, times = event.get("usage"), answer.times
    for choice in event["choices"]:
        answer.text += choice["text"] or ""
        # A server that does not tell how many tokens a chunk holds is believed to send each by itself.
        times.see(usage["completion_tokens"] if usage else times.tokens + bool(choice["text"]), now)
        if choice.get("finish_reason") is not None:
            answer.finish_reason, times.finished = choice["finish_reason"], now
            answer.stop_reason = choice.get("stop_reason")
    if usage and not event["choices"]:
        answer.prompt_tokens = usage["prompt_tokens"]
    if metrics := event.get("metrics"):
        waited = metrics.get("queue_time_ms")
        answer.queue_time = None if waited is None else waited / 1000
        answer.speculation = _speculation(metrics.get("speculative_decoding"))


def _speculation(record: dict[str, Any] | None) -> SpeculationStats:
    """The counts behind vLLM's record of a request's drafts."""
    if record is None:
        return SpeculationStats()
    histogram = record["acceptance_histogram"]
    accepted = [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]
    return SpeculationStats(record["num_spec_steps"], record["num_draft_tokens"], accepted)


def _message(text: str) -> str:
    """The message of an error's body in OpenAI's shape, or the beginning of any other."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:200]
