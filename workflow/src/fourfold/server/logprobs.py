"""Probabilities of tokens in the two shapes of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from fourfold.engine.logprobs import TokenLogprob
from fourfold.server.text import TextThread


async def token_names(text: TextThread, tokens: Sequence[TokenLogprob]) -> dict[int, str]:
    """Each token's text, for the tokens themselves and for those that were likely instead."""
    ids = sorted({entry.token for entry in tokens} | {token for entry in tokens for token, _ in entry.top})
    return dict(zip(ids, await text.strings(ids), strict=True))


def completion_logprobs(tokens: Sequence[TokenLogprob], names: dict[int, str], offset: int) -> dict[str, Any]:
    """Of /v1/completions: parallel lists; `offset` is where the first token's text begins."""
    offsets = []
    for entry in tokens:
        offsets.append(offset)
        offset += len(names[entry.token])
    return {
        "tokens": [names[entry.token] for entry in tokens],
        "token_logprobs": [entry.logprob for entry in tokens],
        "top_logprobs": [_by_name(entry, names) for entry in tokens],
        "text_offset": offsets,
    }


def _by_name(entry: TokenLogprob, names: dict[int, str]) -> dict[str, float] | None:
    """The likely tokens and the one that was chosen; of tokens that look alike the likeliest is shown."""
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        found.setdefault(names[token], logprob)
    return found


def chat_logprobs(tokens: Sequence[TokenLogprob], names: dict[int, str]) -> dict[str, Any]:
    """Of /v1/chat/completions: one object a token."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        name = names[token]
        # A token that holds part of a character has no text, and so no bytes of a text.
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}

    return {
        "content": [
            {**named(entry.token, entry.logprob), "top_logprobs": [named(token, p) for token, p in entry.top]}
            for entry in tokens
        ]
    }
