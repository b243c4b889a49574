"""CUDA graphs: what is computed again and again, captured once and then replayed with one launch."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Captures:
    """Graphs that share their memory, since only one of them runs at a time, and the stream they are captured on.

    cuBLAS takes memory of its own for each stream that it is used on, and keeps it. Nothing is taken before the first.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def capture(
        self, compute: Callable[[], T], undo: Callable[[], None] = lambda: None
    ) -> tuple[Callable[[], None], T]:
        """What computes again, from what is then in the same places, and where the result is after it.

        What is chosen or built at a first call must not be captured, so `compute` runs once before.

        Args: compute waits for nothing, and its result stays in use as long as the graph; undo puts back what its first
        call has changed.
        """
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        undo()
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the GPU meanwhile, as NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result
