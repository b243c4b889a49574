"""Text and tokens for the API: chat template, tokenizer, and how much of a growing text may be shown."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fourfold.model.tokenizer import encode_rendered
from fourfold.server.errors import bad_request

T = TypeVar("T")


def shown_length(text: str, stop: Sequence[str]) -> int:
    """How many of the text's characters no stop string can take back any more.

    All but the longest end of the text that a stop string begins with.
    """
    longest = max(map(len, stop), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(s.startswith(text[start:]) for s in stop):
            return start
    return len(text)


class TextThread:
    """A tokenizer of its own, and the one thread that uses it: tokenizers cannot be shared between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._pool = ThreadPoolExecutor(1, "text")

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return await self._run(lambda: list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)))

    @property
    def chat_template(self) -> str:
        """The template's text."""
        return str(self._tokenizer.chat_template)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the functions that may be called.

        Raises ApiError when the template refuses it.
        """
        return await self._run(self._encode_chat, messages, add_generation_prompt, tools)

    def _encode_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any) -> list[int]:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, tools=tools
            )
        except TemplateError as error:
            raise bad_request(f"messages: the model's chat template refuses them ({error})", "messages") from None
        return encode_rendered(self._tokenizer, str(text))

    async def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        return await self._run(lambda: str(self._tokenizer.decode(token_ids)))

    async def strings(self, token_ids: list[int]) -> list[str]:
        """Each token's text by itself; one that holds part of a character shows as U+FFFD."""
        return await self._run(lambda: [str(self._tokenizer.decode([token])) for token in token_ids])
