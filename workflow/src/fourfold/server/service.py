"""What is served: one model under one name."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fourfold.server.async_engine import AsyncEngine
from fourfold.server.errors import ApiError


@dataclass
class Service:
    """An engine and its name."""

    engine: AsyncEngine
    model: str
    root: Path
    """The engine's directory, which holds the tokenizer: benchmark clients load it from there."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the server is to stop and only ends what runs."""
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not this one."""
        if name is not None and name != self.model:
            message = f"model: {name!r} is not served here; this is {self.model!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "fourfold",
            "root": str(self.root.absolute()),
            "max_model_len": self.engine.engine.max_model_len,
            "engine": self.engine.engine.info,
        }
