"""What a workload needs of whatever generates: submit, poll, cancel. The engine in this process is one such client."""

from typing import Protocol

from fourfold.engine.requests import RequestOutput, SamplingParams


class Client(Protocol):
    """Something that generates text for several requests at once."""

    def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> str:
        """Hands in a request and returns its id."""

    def poll(self) -> list[RequestOutput]:
        """Waits for progress and returns the outputs that have changed; empty when nothing is running."""

    def cancel(self, request_id: str) -> None:
        """Ends a request; its output does not change after this returns."""


class Engine(Protocol):
    """The part of `fourfold.engine.LLMEngine` that the offline client drives."""

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None = None) -> str:
        """Queues a request."""

    def step(self) -> list[RequestOutput]:
        """One step of all running requests."""

    def cancel(self, request_id: str) -> bool:
        """Ends a request."""

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""


class OfflineClient:
    """Drives an engine in this process: a poll is the next engine step that yields tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> str:
        """Queues the request in the engine."""
        return self.engine.add_request(prompt_token_ids, params)

    def poll(self) -> list[RequestOutput]:
        """Steps until some output changes (a long prompt may take several steps); empty when nothing is left."""
        while self.engine.has_unfinished:
            if changed := self.engine.step():
                return changed
        return []

    def cancel(self, request_id: str) -> None:
        """Cancels in the engine, which frees the request's place at once."""
        self.engine.cancel(request_id)
