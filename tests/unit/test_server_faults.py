"""What a client sees of a request that fails inside the engine, and what the others see of it: nothing."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import InternalServerError
from tiny_server import MODEL, TinyServer, byte_engine, tiny_server, until

from fourfold.engine import LLMEngine

BROKEN = 401
"""A token whose embedding is not finite."""


def faulty_engine(folder: Path) -> LLMEngine:
    engine = byte_engine(folder, drafting=False, max_num_batched_tokens=64)
    engine.target.embedding = engine.target.embedding.clone()
    engine.target.embedding[BROKEN, 0] = float("nan")
    return engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    folder = tmp_path_factory.mktemp("model")
    with tiny_server(lambda: faulty_engine(folder)) as running:
        yield running


def complete(server: TinyServer, prompt: list[int], **options: Any) -> Any:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True, **options}
    return server.post("/v1/completions", **body)


def test_a_failed_request_is_a_server_error_and_the_others_answer(server: TinyServer) -> None:
    good = [5, 6, 7]
    alone = complete(server, good).json()["choices"][0]["text"]
    prompts = [good, [*good, BROKEN], [9] * 150 + [BROKEN], good, [BROKEN], good]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        if BROKEN in prompt:
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "request_failed")
            assert "the scores of token 1 hold a NaN or an infinity" in error["message"]
        else:
            assert answer.json()["choices"][0]["text"] == alone
    metrics = server.http().get("/metrics").text
    assert f'vllm:request_success_total{{finished_reason="error",model_name="{MODEL}"}} 3.0' in metrics


def test_one_failed_choice_fails_its_call_and_frees_the_others_slots(server: TinyServer) -> None:
    answer = server.post("/v1/completions", model=MODEL, prompt=[[5, 6], [BROKEN], [7]], max_tokens=400)
    assert answer.status_code == 500
    until(lambda: server.running == 0 and server.engine.engine.num_waiting == 0, 5)


def test_a_stream_ends_with_the_error(server: TinyServer) -> None:
    with pytest.raises(InternalServerError, match="NaN or an infinity"):
        server.openai().completions.create(model=MODEL, prompt=[BROKEN], max_tokens=5)
    lines = complete(server, [BROKEN], stream=True).text.split("\n\n")
    error = json.loads(lines[0].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "request_failed")
    assert lines[1] == "data: [DONE]"


def test_a_request_without_memory_fails_alone(server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.engine.engine
    good = complete(server, [5, 6, 7]).json()["choices"][0]["text"]
    compute = engine.prefill._compute

    def hungry(sequence: Any, tokens: int) -> Any:
        if len(sequence.output.prompt_token_ids) > 100:
            torch.empty(2**60, dtype=torch.uint8)
        return compute(sequence, tokens)

    monkeypatch.setattr(engine.prefill, "_compute", hungry)
    answer = complete(server, [8] * 120)
    assert answer.status_code == 500
    assert "out of memory while its prompt was read; lower max_num_seqs" in answer.json()["error"]["message"]
    assert complete(server, [5, 6, 7]).json()["choices"][0]["text"] == good
