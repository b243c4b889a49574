"""The API as its clients use it: OpenAI's own client, and raw HTTP; answers are those of the engine."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tiny_server import MODEL, VOCABULARY, TinyServer, byte_engine, tiny_server

from fourfold import __version__
from fourfold.engine import LLMEngine, SamplingParams

PROMPT = "Ada has 3 apples and buys 4 more."
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    """The same model without drafts: what answers should be."""
    return byte_engine(tmp_path_factory.mktemp("reference"), drafting=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    folder = tmp_path_factory.mktemp("model")
    with tiny_server(lambda: byte_engine(folder), root=folder) as running:
        yield running


def answer(reference: LLMEngine, prompt: str = PROMPT, **params: Any) -> Any:
    tokens = reference.tokenizer.encode(prompt)
    return reference.generate([tokens], [SamplingParams(**{"max_tokens": 40, **params})])[0]


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """A stream's events as sent, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_completion_is_the_engines(server: TinyServer, reference: LLMEngine) -> None:
    expected = answer(reference)
    found = server.openai().completions.create(**GREEDY)
    assert (found.object, found.model) == ("text_completion", MODEL)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == len(expected.token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_prompts_may_be_text_or_tokens_one_or_many(server: TinyServer, reference: LLMEngine) -> None:
    tokens = reference.tokenizer.encode(PROMPT)
    one, other = answer(reference).text, answer(reference, "Therefore").text
    for prompt, texts in (
        (tokens, [one]),
        ([PROMPT, "Therefore"], [one, other]),
        ([tokens, reference.tokenizer.encode("Therefore")], [one, other]),
    ):
        found = server.openai().completions.create(**{**GREEDY, "prompt": prompt})
        assert [choice.text for choice in found.choices] == texts
        assert [choice.index for choice in found.choices] == list(range(len(texts)))


def test_a_stream_is_the_whole_in_pieces(server: TinyServer, reference: LLMEngine) -> None:
    whole = server.post("/v1/completions", **GREEDY).json()
    streamed = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(server.post("/v1/completions", **streamed))
    assert len(chunks) > 1
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["text"], "an empty chunk before the first token"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["metrics"]["speculative_decoding"] == whole["metrics"]["speculative_decoding"]
    assert not any("metrics" in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_chunk_can_tell_how_many_tokens_there_are(server: TinyServer, path: str) -> None:
    body = {**(CHAT if "chat" in path else GREEDY), "max_tokens": 40, "n": 2, "seed": 5, "temperature": 0.9}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(server.post(path, **body, stream=True, stream_options=options))
    counts: dict[int, list[int]] = {0: [0], 1: [0]}
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counts[chunk["choices"][0]["index"]].append(usage["completion_tokens"])
    assert all(seen == sorted(seen) and len(set(seen)) > 1 for seen in counts.values())
    assert counts[0][-1] + counts[1][-1] == last["usage"]["completion_tokens"]


def test_a_chat_is_in_the_models_template(server: TinyServer, reference: LLMEngine) -> None:
    template = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    expected = answer(reference, template, max_tokens=30).text
    parts = [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:]}]
    for content in (PROMPT, parts):
        body = {**CHAT, "messages": [{"role": "user", "content": content}], "max_completion_tokens": 30}
        found = server.openai().chat.completions.create(**body)
        assert found.object == "chat.completion"
        assert found.choices[0].message.role == "assistant"
        assert found.choices[0].message.content == expected
        chunks = list(server.openai().chat.completions.create(**body, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].choices[0].delta.content, "a chunk with a role alone before the first token"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(server: TinyServer) -> None:
    found = server.post("/v1/chat/completions", **CHAT, ignore_eos=True).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == 512


def test_seeds_repeat_and_choices_differ(server: TinyServer) -> None:
    sampled = {**GREEDY, "temperature": 1.5, "max_tokens": 12}

    def texts(**body: Any) -> list[str]:
        found = server.post("/v1/completions", **sampled, **body).json()
        assert found["metrics"] is None or body.get("n", 1) == 1
        return [choice["text"] for choice in found["choices"]]

    assert texts(seed=5, n=3) == texts(seed=5) + texts(seed=6) + texts(seed=7)
    assert len(set(texts(n=4) + texts(n=4))) > 1
    streamed = ["", "", ""]
    for chunk in events(server.post("/v1/completions", **sampled, seed=5, n=3, stream=True)):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts(seed=5, n=3)


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_are_never_shown(server: TinyServer, reference: LLMEngine, as_list: bool) -> None:
    free = answer(reference, ignore_eos=True, max_tokens=60).text
    # Strings that begin in one piece and end in a later one, at several places.
    for start in range(8, 40, 4):
        stop = free[start : start + 4]
        body = {**GREEDY, "max_tokens": 60, "ignore_eos": True, "stop": ["never", stop] if as_list else stop}
        chunks = events(server.post("/v1/completions", **body, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == free[: free.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == free[: free.index(stop)]


def test_echo_scores_the_prompt_as_lm_eval_asks(server: TinyServer, reference: LLMEngine) -> None:
    """lm-eval's local-completions: token ids, one new token, which it drops, and whether all were greedy."""
    greedy = answer(reference, ignore_eos=True, max_tokens=6)
    tokens = greedy.prompt_token_ids + greedy.token_ids
    body = {"model": MODEL, "prompt": [tokens, tokens[:-1]], "temperature": 0, "max_tokens": 1}
    found = server.post("/v1/completions", **body, logprobs=1, seed=1234, echo=True).json()
    params = SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=1)
    for choice, prompt in zip(found["choices"], body["prompt"], strict=True):
        (expected,) = reference.generate([prompt], [params])
        entries = expected.prompt_logprobs + expected.logprobs
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx([entry.logprob for entry in entries[1:]], abs=1e-4)
        pairs = zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        is_greedy = [own == max(top.values()) for own, top in list(pairs)[len(greedy.prompt_token_ids) : -1]]
        assert is_greedy == [True] * (len(prompt) - len(greedy.prompt_token_ids))
        assert choice["text"].startswith(reference.tokenizer.decode(prompt))
    text = server.post("/v1/completions", **{**GREEDY, "max_tokens": 3}, logprobs=0, echo=True).json()["choices"][0]
    assert text["text"].startswith(PROMPT)
    assert text["logprobs"]["text_offset"][:2] == [0, len(text["logprobs"]["tokens"][0])]


def test_logprobs_of_answers_agree_in_all_forms(server: TinyServer) -> None:
    body = {**GREEDY, "max_tokens": 20}
    whole = server.post("/v1/completions", **body, logprobs=2).json()["choices"][0]["logprobs"]
    assert all(
        max(top.values()) == own for own, top in zip(whole["token_logprobs"], whole["top_logprobs"], strict=True)
    )
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in events(server.post("/v1/completions", **body, logprobs=2, stream=True)):
        for name, values in chunk["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == whole
    found = server.openai().chat.completions.create(**CHAT, max_tokens=8, logprobs=True, top_logprobs=3)
    assert found.choices[0].logprobs is not None
    for entry in found.choices[0].logprobs.content or []:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_acceptance_and_times_are_told(server: TinyServer) -> None:
    found = server.post("/v1/completions", **GREEDY, ignore_eos=True).json()
    metrics, speculation = found["metrics"], found["metrics"]["speculative_decoding"]
    assert speculation["num_spec_tokens"] == 3
    histogram = speculation["acceptance_histogram"]
    assert len(histogram) == 4
    assert sum(histogram) == speculation["num_spec_steps"]
    assert sum(i * count for i, count in enumerate(histogram)) == speculation["num_accepted_draft_tokens"]
    length = 1 + speculation["num_accepted_draft_tokens"] / speculation["num_spec_steps"]
    assert math.isclose(speculation["mean_acceptance_length"], length)
    assert 0 <= metrics["queue_time_ms"] < metrics["time_to_first_token_ms"]
    assert metrics["mean_itl_ms"] * 39 == pytest.approx(metrics["generation_time_ms"])


def test_what_vllm_bench_serve_sends_and_reads(server: TinyServer) -> None:
    """Its bodies, its reading of the stream, the model's root, and the counters it takes acceptance from."""

    def counter(name: str) -> float:
        lines = server.http().get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    before = counter("vllm:spec_decode_num_drafts_total")
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": 24,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    headers = {"x-request-id": "bench-0", "Authorization": "Bearer EMPTY"}
    tokens, text = None, ""
    with server.http() as client, client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        for line in response.iter_lines():
            if not line or line.startswith(":") or line == "data: [DONE]":
                continue
            data = json.loads(line.removeprefix("data: "))
            if choices := data.get("choices"):
                text += choices[0].get("text") or ""
            elif usage := data.get("usage"):
                tokens = usage["completion_tokens"]
    assert tokens == 24
    assert text
    chat = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]}
    chat |= {"max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True}, "top_k": -1}
    assert events(server.post("/v1/chat/completions", **chat))[-1]["usage"]["completion_tokens"] <= 4
    names = "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos"
    drafts, drafted, accepted, by_position = (counter(f"vllm:spec_decode_{name}_total") for name in names)
    assert drafts > before
    assert drafted >= drafts
    assert accepted == by_position
    assert counter("vllm:request_success_total") >= 2
    assert counter("vllm:time_to_first_token_seconds_count") > 0


def test_models_version_and_tokens(server: TinyServer, reference: LLMEngine) -> None:
    (model,) = server.openai().models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512)  # type: ignore[attr-defined]
    assert (Path(model.root) / "tokenizer.json").is_file()  # type: ignore[attr-defined]
    assert server.http().get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    assert server.http().get("/version").json() == {"version": __version__}
    assert server.http().get("/health").status_code == 200
    found = server.post("/tokenize", prompt=PROMPT).json()
    assert found == {"count": len(found["tokens"]), "max_model_len": 512, "tokens": reference.tokenizer.encode(PROMPT)}
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": PROMPT}
    chat = server.post("/tokenize", messages=CHAT["messages"]).json()["tokens"]
    assert server.post("/detokenize", tokens=chat).json()["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "words"),
    [
        ("completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {"temperature": "hot"}, 400, "temperature", "valid number"),
        ("completions", {"top_p": 0}, 400, "top_p", "greater than 0"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ("completions", {"n": 129}, 400, "n", "less than or equal to 128"),
        ("completions", {"n": 100}, 400, "n", "100 answers in one call; this server takes 72"),
        ("completions", {"stop": ["a", ""]}, 400, "stop[1]", "at least 1 character"),
        ("completions", {"stop": 7}, 400, "stop", "valid list"),
        ("completions", {"prompt": []}, 400, "prompt", ""),
        ("completions", {"prompt": ""}, 400, "prompt", "no tokens"),
        ("completions", {"prompt": [VOCABULARY]}, 400, "prompt", "outside 0 … 511"),
        ("completions", {"prompt": [1] * 500}, 400, "prompt", "500 prompt tokens + 40 max_tokens = 540, more than"),
        ("completions", {"prompt": "a\ud800"}, 400, "prompt", "surrogate"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, 400, "messages[0].content", "surr"),
        ("completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty", "is not supported"),
        ("completions", {"logit_bias": {"5": 1}}, 400, "logit_bias", "is not supported"),
        ("completions", {"wizardry": True}, 400, "wizardry", "is not supported"),
        ("completions", {"echo": True, "stream": True}, 400, "echo", "not supported in a stream"),
        ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
        ("completions", {"model": "gpt-4"}, 404, "model", "not served here"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}, 400, "messages[0].role", "'user'"),
        (
            "chat/completions",
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "tools",
            "knows no tools",
        ),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format", "is not supported"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"max_tokens": 1000}, 400, "messages", "1000 max_tokens"),
    ],
)
def test_what_is_wrong_is_named(
    server: TinyServer, path: str, change: dict[str, Any], status: int, param: str, words: str
) -> None:
    base = GREEDY if path == "completions" else CHAT
    response = server.http().post(
        f"/v1/{path}", content=json.dumps({**base, **change}), headers={"Content-Type": "application/json"}
    )
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    if status == 400:
        assert error["message"].startswith(param)
        assert error["type"] == "invalid_request_error"


def test_an_overlong_input_has_openais_code(server: TinyServer) -> None:
    error = server.post("/v1/completions", **{**GREEDY, "prompt": [1] * 500}).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/nowhere", b"", 404),
    ],
)
def test_every_error_has_openais_shape(server: TinyServer, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.http().request(method, path, content=content, headers=headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_page_in_a_browser_cannot_ask(server: TinyServer) -> None:
    """Without a preflight a page may send forms and plain text, but not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = server.http().post("/v1/completions", content=json.dumps(GREEDY), headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "application/json" in response.json()["error"]["message"]
