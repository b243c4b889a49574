"""How each backend's engines are served: the command that starts a server with OpenAI's API."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """What a server is to serve, and where."""

    engine: Path
    """The engine's directory."""
    port: int
    """On 127.0.0.1."""
    device: str
    """auto, cpu or cuda."""
    max_waiting: int
    """Requests that may wait for a slot, where the server limits them."""
    enable_prefix_caching: bool = False
    """Whether prompts may be read from a cache: those of a benchmark are the same again and again."""


def _torch(served: Served) -> list[str]:
    command = [sys.executable, "-m", "fourfold.cli", "serve", str(served.engine), "--port", str(served.port)]
    # No request runs any more when the server is stopped, unless the benchmark has failed.
    limits = ["--max-waiting", str(served.max_waiting), "--drain-seconds", "1"]
    caching = "--enable-prefix-caching" if served.enable_prefix_caching else "--no-enable-prefix-caching"
    return [*command, "--device", served.device, caching, *limits]


def _tensorrt_llm(served: Served) -> list[str]:
    # `fourfold serve` becomes trtllm-serve, whose limits are the engine's own.
    return [sys.executable, "-m", "fourfold.cli", "serve", str(served.engine), "--port", str(served.port)]


COMMANDS: dict[str, Callable[[Served], list[str]]] = {"torch": _torch, "tensorrt_llm": _tensorrt_llm}
"""Backend → the command that serves its engines."""
