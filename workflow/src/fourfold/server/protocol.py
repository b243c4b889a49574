"""The bodies of requests: OpenAI's fields, and vLLM's further ones. What is not supported is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fourfold.server.tools import Tool, ToolCall

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_TOP_LOGPROBS = 20


def only(*values: Any) -> AfterValidator:
    """For a field that clients send but that is not supported: null, and values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError(f"is not supported; leave it out, or give {' or '.join(map(repr, values)) or 'null'}")
        return value

    return AfterValidator(check)


def _whole(value: str) -> str:
    """JSON can spell halves of characters, which no text holds."""
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return value


Text = Annotated[str, AfterValidator(_whole)]


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_whole)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list),
]
Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    """A body of which all fields are known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk tells how many tokens there are so far, as in vLLM."""
    include_obfuscation: Annotated[Any, only(False)] = None


class GenerationBody(Body):
    """What both kinds of generation share. A field that is null has its default."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops = []
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used, as OpenAI's clients send it for accounting."""

    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    logit_bias: Annotated[Any, only({})] = None
    best_of: Annotated[Any, only(1)] = None
    metadata: Annotated[Any, only({})] = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Positive | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Annotated[Any, only("")] = None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant makes tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """For the chat template: the content as one text."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        named = {} if self.name is None else {"name": self.name}
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        # Templates know the older name of a developer's message.
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **named, **calls}


Conversation = Annotated[list[Message], Field(min_length=1)]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Conversation
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    tools: list[Tool] | None = None
    """Functions that the model may call, where its chat template knows them."""
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    chat_template_kwargs: Annotated[Any, only({})] = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: Conversation | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: Annotated[Any, only(False)] = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
