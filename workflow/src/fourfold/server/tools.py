"""Calls of a client's functions in a chat: how templates show functions to the model, and what the model writes back.

One format is known, that of Qwen2.5, Hermes and the models trained like them: `<tool_call>`, a JSON object with `name`
and `arguments`, `</tool_call>`. A model whose template has none of it cannot be given functions.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jinja2 import Environment, TemplateError, meta
from pydantic import BaseModel, ConfigDict, Field

from fourfold.server.text import shown_length

BEGIN, END = "<tool_call>", "</tool_call>"


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""


class Tool(BaseModel):
    """A tool: a function is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class CalledFunction(BaseModel):
    """A call that the model made earlier in the conversation."""

    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(BaseModel):
    """An earlier call with its id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """For the chat template, which writes the arguments as JSON itself. Text that is not JSON stays text."""
        try:
            arguments: Any = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        return {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def knows_tools(chat_template: str) -> bool:
    """Whether a template shows functions to the model, in the format that is known."""
    try:
        names = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(chat_template))
    except TemplateError:
        # A tag of transformers' own, such as generation: the name alone has to do.
        names = {"tools"} if "tools" in chat_template else set()
    return "tools" in names and BEGIN in chat_template


class CallParser:
    """Parts the growing text of one answer into content and calls.

    Text is held back while it could be the beginning of a call; a call is told when it is whole. What only looks like
    a call, and a call that the answer's end cuts off, is content.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the functions that may be called."""
        self._names, self._text, self._number = frozenset(names), "", 0
        # Line breaks behind a call are part of the format.
        self._skips_space = False

    @property
    def found(self) -> bool:
        """Whether there was a call."""
        return self._number > 0

    def feed(self, text: str, ended: bool) -> tuple[str, list[dict[str, Any]]]:
        """Takes the next text, the last if `ended`; returns what is known now: content, and calls in OpenAI's shape."""
        if not self._names:
            return text, []
        self._add(text)
        content, calls = "", []
        while BEGIN in self._text:
            before, _, rest = self._text.partition(BEGIN)
            inside, end, after = rest.partition(END)
            content += before
            self._text = BEGIN + rest
            if not end:
                break
            call = self._call(inside)
            if call is None:
                content += BEGIN + inside + END
            else:
                calls.append(call)
                self._skips_space = True
            self._text = ""
            self._add(after)
        known = 0 if self._text.startswith(BEGIN) else shown_length(self._text, [BEGIN])
        if ended:
            known = len(self._text)
        content, self._text = content + self._text[:known], self._text[known:]
        return content, calls

    def _add(self, text: str) -> None:
        if self._skips_space:
            text = text.lstrip()
            self._skips_space = not text
        self._text += text

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            values = json.loads(text)
            name, arguments = values["name"], values.get("arguments", {})
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        if name not in self._names or not isinstance(arguments, dict):
            return None
        self._number += 1
        return {
            "index": self._number - 1,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
