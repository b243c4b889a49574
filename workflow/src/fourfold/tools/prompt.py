"""A prompt that grows: what was asked, what the model wrote, what its code printed.

Sent as token ids where the server has `/tokenize` (ours, vLLM), as text where it has not (trtllm-serve). Either way
what code printed is plain text, and so is what the model wrote, which may repeat it; only the tags are what they are.
"""

from fourfold.client.api import ApiClient
from fourfold.errors import FourfoldError
from fourfold.tools.plain import broken, pieces
from fourfold.tools.presets import Preset


class GrowingPrompt:
    """The prompt of one generation. `start` comes first."""

    def __init__(self, client: ApiClient, model: str, preset: Preset) -> None:
        self._client, self._model, self._preset = client, model, preset
        self._text: str | None = None
        self._tokens: list[int] = []
        self._known: dict[str, list[int]] = {}

    @property
    def content(self) -> str | list[int]:
        """For a request's `prompt`."""
        return self._tokens if self._text is None else self._text

    @property
    def length(self) -> int | None:
        """Tokens; None where the server alone knows."""
        return len(self._tokens) if self._text is None else None

    async def start(self, problem: str, template: str | None) -> None:
        """Begins it.

        Args:
            problem: what is asked.
            template: a text in which `{problem}` is replaced, to be continued; None asks in the model's chat template.
        Raises FourfoldError when the server refuses.
        """
        if template is None:
            tokens = await self._client.tokenize(self._model, messages=[{"role": "user", "content": problem}])
        else:
            tokens = await self._client.tokenize(self._model, prompt=template.replace("{problem}", problem))
        if tokens is None:
            self._text = (template or self._preset.chat).replace("{problem}", problem)
        else:
            self._tokens = tokens

    async def add_written(self, text: str) -> None:
        """Adds what the model wrote, its tags included."""
        await self._add(text, (self._preset.code_begin, self._preset.code_end))

    async def add_output(self, text: str) -> None:
        """Adds an output block around plain text."""
        await self._add(self._preset.output_begin, (self._preset.output_begin,), parted=False)
        await self._add(text)
        await self._add(self._preset.output_end, (self._preset.output_end,), parted=False)

    async def _add(self, text: str, whole: tuple[str, ...] = (), parted: bool = True) -> None:
        if self._text is not None:
            self._text += broken(text, whole) if parted else text
            return
        for piece in pieces(text, whole) if parted else [text]:
            if piece not in self._known:
                tokens = await self._client.tokenize(self._model, prompt=piece, add_special_tokens=False)
                if tokens is None:
                    raise FourfoldError(f"{self._client.base_url}/tokenize has gone; start the server again")
                self._known[piece] = tokens
            self._tokens += self._known[piece]
