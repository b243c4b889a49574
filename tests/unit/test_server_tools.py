"""Functions in a chat: shown in the template, told as OpenAI's tool calls, whole and streamed; else refused by name."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import TOKENIZER, scripted_engine
from tiny_server import MODEL, TinyServer, tiny_server

from fourfold.server.tools import CallParser, knows_tools

# Qwen2.5's, without its words.
TEMPLATE = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools> Answer with <tool_call>{"name": …, "arguments": …}</tool_call>.<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALLS = (
    'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": "x"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
)
ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "3 + 4?"}], "temperature": 0}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return []


@pytest.fixture(scope="module")
def server(prompts: list[str]) -> Iterator[TinyServer]:
    engine = scripted_engine([CALLS])
    engine.tokenizer.chat_template = TEMPLATE
    add = engine.add_request

    def noted(tokens: list[int], *rest: Any) -> str:
        prompts.append(str(engine.tokenizer.decode(tokens)))
        return add(tokens, *rest)

    engine.add_request = noted  # type: ignore[method-assign]
    with tiny_server(lambda: engine) as running:
        yield running


def test_calls_are_told_in_openais_shape(server: TinyServer, prompts: list[str]) -> None:
    found = server.openai().chat.completions.create(**ASKED, tools=[ADD]).choices[0]
    assert (found.finish_reason, found.message.content) == ("tool_calls", "I add.\n")
    calls = found.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "add", {"a": 3, "b": "x"}),
        ("function", "add", {}),
    ]
    assert len({call.id for call in calls}) == 2
    assert '"description": "Adds."' in prompts[-1]


def test_a_stream_tells_the_same(server: TinyServer) -> None:
    chunks = list(server.openai().chat.completions.create(**ASKED, tools=[ADD], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I add.\n"
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (0, "add", {"a": 3, "b": "x"}),
        (1, "add", {}),
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert deltas[0].role == "assistant"
    assert all(delta.content or delta.tool_calls for delta in deltas[:-1]), "a chunk that says nothing"


def test_answers_of_tools_go_into_the_template(server: TinyServer, prompts: list[str]) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    server.openai().chat.completions.create(**{**ASKED, "messages": [*ASKED["messages"], *said]}, tools=[ADD])
    assert '{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>' in prompts[-1]
    assert "<tool_response>\n7\n</tool_response>" in prompts[-1]


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}])
def test_without_tools_the_text_is_text(server: TinyServer, prompts: list[str], body: dict[str, Any]) -> None:
    found = server.post("/v1/chat/completions", **ASKED, **body).json()["choices"][0]
    assert (found["message"], found["finish_reason"]) == ({"role": "assistant", "content": CALLS}, "stop")
    assert "<tools>" not in prompts[-1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{**ADD, "type": "browser"}]}, "tools[0].type"),
        ({"tools": [ADD], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
    ],
)
def test_what_is_not_supported_is_named(server: TinyServer, body: dict[str, Any], param: str) -> None:
    refused = server.post("/v1/chat/completions", **{**ASKED, **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_template_without_tools_is_a_400_that_names_the_field() -> None:
    with tiny_server(lambda: scripted_engine(["No."])) as server:
        refused = server.post("/v1/chat/completions", **ASKED, tools=[ADD])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"
    assert "chat template knows no tools" in refused.json()["error"]["message"]


def test_arguments_are_json_whatever_they_hold() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": "é \\"", "b": [1, null]}}</tool_call>'
    _, (call,) = CallParser(["add"]).feed(text, ended=True)
    assert json.loads(call["function"]["arguments"]) == {"a": 'é "', "b": [1, None]}


def test_which_templates_know_tools() -> None:
    assert knows_tools(TEMPLATE)
    assert not knows_tools((TOKENIZER / "chat_template.jinja").read_text())
    assert not knows_tools("{{ tools }}"), "another format"
    assert not knows_tools("{% set tools = 1 %}<tool_call>")


@given(
    st.lists(
        st.sampled_from(
            [
                "a ",
                "\n",
                "<",
                "<tool",
                "<tool_call>",
                "</tool_call>",
                '{"name": "add"}',
                '{"name": "no"}',
                "{",
                "[1]",
                "é",
            ]
        ),
        max_size=14,
    )
)
@settings(max_examples=150, deadline=None)
def test_pieces_tell_what_the_whole_tells(parts: list[str]) -> None:
    """However the text is cut; and nothing that is no call is lost."""
    whole = CallParser(["add"])
    text, calls = whole.feed("".join(parts), ended=True)
    growing = CallParser(["add"])
    found = [growing.feed(part, ended=False) for part in parts] + [growing.feed("", ended=True)]
    assert sum(len(some) for _, some in found) == len(calls)
    assert "".join(said for said, _ in found) == text
    if not calls:
        assert text == "".join(parts)
