"""Many clients at once: some go in the middle, some send nonsense, some read slowly; no answer is lost or mixed."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tiny_server import MODEL, TinyServer, byte_engine, tiny_server, until

from fourfold.engine import LLMEngine, SamplingParams

Body = dict[str, Any]


def body(rng: random.Random) -> Body:
    """A request whose answer can be known: all have a seed or are greedy. A few dozen different ones."""
    return {
        "model": MODEL,
        "prompt": f"Ada has {rng.randint(2, 6)} apples",
        "max_tokens": rng.choice((1, 8, 40)),
        "temperature": rng.choice((0, 1.2)),
        "seed": rng.randint(1, 2),
        "stop": rng.choice(([], ["e"], ["\n", "th"])),
    }


NONSENSE: list[tuple[dict[str, Any], set[int]]] = [
    ({"content": b"{"}, {400}),
    ({"content": b"\x00\xff" * 50}, {400}),
    ({"json": {"model": MODEL}}, {400}),
    ({"json": {"model": "other", "prompt": "a"}}, {404}),
    ({"json": {"prompt": [1] * 900}}, {400}),
]


class Expected:
    """What each request's answer must be, from an engine of its own, one request at a time."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[str, str | None]] = {}

    def __call__(self, asked: Body) -> tuple[str, str | None]:
        key = json.dumps(asked)
        if key not in self._known:
            params = {name: asked[name] for name in ("max_tokens", "temperature", "seed")}
            prompt = self._engine.tokenizer.encode(asked["prompt"])
            (output,) = self._engine.generate([prompt], [SamplingParams(**params, stop=tuple(asked["stop"]))])
            self._known[key] = output.text, output.finish_reason
        return self._known[key]


async def client(server: TinyServer, seed: int, end: float, answers: list[tuple[Body, str, str]]) -> Counter[str]:
    """One client until the time is over; it keeps what it was answered."""
    rng, counts = random.Random(seed), Counter[str]()
    async with httpx2.AsyncClient(base_url=server.url, timeout=120) as http:
        while time.monotonic() < end:
            kind, asked = rng.random(), body(rng)
            if kind < 0.1:
                options, statuses = rng.choice(NONSENSE)
                response = await http.post("/v1/completions", headers={"Content-Type": "application/json"}, **options)
                assert response.status_code in statuses, response.text
                counts["nonsense"] += 1
            elif kind < 0.3:
                # Goes in the middle, with or without a stream.
                going = asyncio.create_task(http.post("/v1/completions", json={**asked, "stream": kind < 0.2}))
                await asyncio.sleep(rng.random() * 0.3)
                going.cancel()
                await asyncio.gather(going, return_exceptions=True)
                counts["gone"] += 1
            elif kind < 0.6:
                response = await http.post("/v1/completions", json=asked)
                if response.status_code == 200:
                    (choice,) = response.json()["choices"]
                    answers.append((asked, choice["text"], choice["finish_reason"]))
                counts[str(response.status_code)] += 1
            else:
                status, text, reason = await read_stream(http, asked, rng.choice((0, 0, 0.02)))
                if status == 200:
                    answers.append((asked, text, reason))
                counts[str(status)] += 1
    return counts


async def read_stream(http: httpx2.AsyncClient, asked: Body, pause: float) -> tuple[int, str, str]:
    """Status, text and reason of a streamed answer, read with a pause after each event."""
    text, reason, ended = "", "", False
    async with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
                await asyncio.sleep(pause)
    assert ended or response.status_code != 200, "a stream without its end"
    return response.status_code, text, reason


def load(folder: Path, clients: int, seconds: float) -> tuple[Counter[str], int]:
    """Runs the clients; returns what they did and by how many bytes the process grew in the second half."""
    answers: list[tuple[Body, str, str]] = []
    half: list[int] = []

    async def run(server: TinyServer) -> Counter[str]:
        end = time.monotonic() + seconds

        async def measure() -> None:
            await asyncio.sleep(seconds / 2)
            half.append(psutil.Process().memory_info().rss)

        _, *counts = await asyncio.gather(measure(), *(client(server, seed, end, answers) for seed in range(clients)))
        return sum(counts, Counter())

    with tiny_server(lambda: byte_engine(folder), max_waiting=2 * clients) as server:
        counts = asyncio.run(run(server))
        grown = psutil.Process().memory_info().rss - half[0]
        until(lambda: server.running == 0 and not server.engine._open, 10)
        assert not server.engine._tickets
        assert not server.engine.engine.has_unfinished
        metrics = server.http().get("/metrics").text
        assert f'vllm:num_requests_running{{model_name="{MODEL}"}} 0.0' in metrics
        assert f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 0.0' in metrics
    expected = Expected(byte_engine(folder, drafting=False))
    for asked, text, reason in answers:
        assert (text, reason) == expected(asked), asked
    assert len(answers) == counts["200"]
    assert set(counts) <= {"200", "429", "nonsense", "gone"}
    return counts, grown


def test_many_clients_get_their_own_answers(tmp_path: Path) -> None:
    counts, _ = load(tmp_path, clients=24, seconds=6)
    assert counts["200"] > 24
    assert counts["gone"] > 5
    assert counts["nonsense"] > 2


@pytest.mark.soak
def test_two_hundred_clients_for_a_minute(tmp_path: Path) -> None:
    counts, grown = load(tmp_path, clients=200, seconds=60)
    print(f"{dict(counts)}, grown by {grown / 2**20:.1f} MiB in the second half")
    assert counts["200"] > 1000
    assert counts["gone"] > 200
    assert grown < 30 * 2**20, "memory is not flat"
