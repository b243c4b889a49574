"""The client against real servers: what it sees of streams, drafts, errors, and of its own cancelling."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from tiny_server import MODEL, TinyServer, byte_engine, tiny_server, until

from fourfold.benchmark import metrics
from fourfold.client.api import ApiClient, Completion
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.errors import FourfoldError

T = TypeVar("T")
PROMPTS = [[3 + i, 50, 60, 7 * i + 9] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TinyServer]:
    with tiny_server(lambda: byte_engine(folder), max_waiting=2, api_key="key") as running:
        yield running


@pytest.fixture(scope="module")
def offline(folder: Path) -> LLMEngine:
    return byte_engine(folder)


def ask(server: TinyServer, work: Callable[[ApiClient], Awaitable[T]], api_key: str = "key") -> T:
    async def run() -> T:
        async with ApiClient(server.url, api_key) as client:
            return await work(client)

    return asyncio.run(run())


def params(number: int, **values: float) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 48, "temperature": 0.8, "seed": number, **values})  # type: ignore[arg-type]


async def complete_all(client: ApiClient, wanted: list[SamplingParams]) -> list[Completion]:
    answers = [Completion() for _ in wanted]
    asked = zip(PROMPTS, wanted, answers, strict=True)
    await asyncio.gather(*(client.complete(MODEL, prompt, p, answer) for prompt, p, answer in asked))
    return answers


def test_answers_tokens_and_drafts_are_the_engines(server: TinyServer, offline: LLMEngine) -> None:
    wanted = [params(i) for i in range(len(PROMPTS))]
    answers = ask(server, lambda client: complete_all(client, wanted))
    for answer, output in zip(answers, offline.generate(PROMPTS, wanted), strict=True):
        assert (answer.text, answer.finish_reason) == (output.text, output.finish_reason)
        assert answer.times.tokens == len(output.token_ids)
        assert answer.prompt_tokens == len(output.prompt_token_ids)
        assert answer.speculation == output.speculation
        assert answer.speculation.num_drafts > 0
        assert answer.error is None
        times = answer.times
        assert len(times.times) == len(times.sizes) <= answer.speculation.num_drafts + 1
        assert times.sent < times.times[0] <= times.times[-1] <= (times.finished or 0)
        assert len(metrics.inter_token_latencies(times)) == times.tokens - times.sizes[0]
        assert answer.queue_time is not None
        assert 0 <= answer.queue_time < metrics.ttft(times)  # type: ignore[operator]


def test_a_refused_request_is_told_and_raises_nothing(server: TinyServer) -> None:
    answers = ask(
        server, lambda client: complete_all(client, [params(0), *[params(i, max_tokens=900) for i in range(3)]])
    )
    assert answers[0].error is None
    for answer in answers[1:]:
        assert (answer.finish_reason, answer.times.finished, answer.times.tokens) == ("error", None, 0)
        assert "400: prompt: 4 prompt tokens + 900 max_tokens = 904" in str(answer.error)


def test_a_wrong_key_is_told(server: TinyServer) -> None:
    (answer, *_) = ask(server, lambda client: complete_all(client, [params(0)] * 4), api_key="wrong")
    assert str(answer.error).startswith("401: this server needs its API key")
    with pytest.raises(FourfoldError, match=r"/v1/models: no model is served there .*401"):
        ask(server, lambda client: client.model_card(), api_key="wrong")


def test_nobody_there_is_told(server: TinyServer) -> None:
    nowhere = TinyServer("http://127.0.0.1:9", server.engine, server.stop, server.connections)
    (answer, *_) = ask(nowhere, lambda client: complete_all(client, [params(0)] * 4))
    assert "ConnectError" in str(answer.error)
    with pytest.raises(FourfoldError, match=r"127\.0\.0\.1:9/v1/models: no model is served there"):
        ask(nowhere, lambda client: client.model_card())


def test_a_cancelled_request_frees_its_slot_and_keeps_what_came(server: TinyServer) -> None:
    async def begin(client: ApiClient) -> Completion:
        answer = Completion()
        long = SamplingParams(max_tokens=500, ignore_eos=True)
        task = asyncio.create_task(client.complete(MODEL, PROMPTS[0], long, answer))
        while answer.times.tokens < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return answer

    answer = ask(server, begin)
    assert 5 <= answer.times.tokens < 500
    assert answer.text
    assert answer.error is None
    assert answer.finish_reason is None
    until(lambda: server.running == 0, 5)


def test_the_card_tells_of_the_engine_and_metrics_are_read(server: TinyServer) -> None:
    card = ask(server, lambda client: client.model_card())
    assert (card["id"], card["max_model_len"], card["engine"]) == (MODEL, 512, {})
    assert ask(server, lambda client: client.metric("vllm:num_requests_running")) == 0
    assert ask(server, lambda client: client.metric("fourfold:gpu_peak_memory_bytes")) == 0
    assert ask(server, lambda client: client.metric("vllm:num_requests")) is None


def test_a_server_that_fails_in_the_middle_is_told(folder: Path) -> None:
    def load() -> LLMEngine:
        engine = byte_engine(folder)
        step, steps = engine.step, iter(range(6))

        def fail() -> object:
            if next(steps, None) is None:
                raise RuntimeError("the device is lost")
            return step()

        engine.step = fail  # type: ignore[method-assign, assignment]
        return engine

    with tiny_server(load) as broken:
        (answer, *_) = ask(broken, lambda client: complete_all(client, [params(i) for i in range(4)]))
    assert "the engine has failed" in str(answer.error)
    assert answer.times.tokens > 0
    assert answer.finish_reason == "error"
