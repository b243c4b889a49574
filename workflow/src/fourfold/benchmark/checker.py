"""Compares answers in a process of its own, which can be killed: sympy can hang or take all memory on hostile input.

math-verify's own time-outs are signals; those work in a main thread only and cannot interrupt a long C call.
"""

import multiprocessing
import resource
from multiprocessing.connection import Connection
from types import TracebackType

from fourfold.benchmark.answers import same_answer
from fourfold.progress import logger

START_SECONDS = 120.0
MEMORY_BYTES = 4 << 30


def _serve(pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    same_answer("x+1", "1+x")  # imports sympy before the clock of the first comparison starts
    pipe.send(True)
    while True:
        try:
            answer, expected = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(same_answer(answer, expected))
        except Exception:
            # Whatever sympy makes of a generated text (recursion, memory, its own bugs), it is no right answer.
            pipe.send(False)


class AnswerChecker:
    """Context manager: `same(answer, expected)` takes at most `seconds`; a comparison that takes longer is False."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.timeouts = 0
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._known: dict[tuple[str, str], bool] = {}

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def same(self, answer: str | None, expected: str) -> bool:
        """Whether the answers are equal; False for None, and when the comparison takes too long."""
        if not answer:
            return False
        key = (answer, expected)
        if key not in self._known:
            self._known[key] = self._ask(answer, expected)
        return self._known[key]

    def _ask(self, answer: str, expected: str) -> bool:
        pipe = self._start()
        try:
            pipe.send((answer, expected))
            if pipe.poll(self.seconds):
                return bool(pipe.recv())
        except (EOFError, OSError):
            pass  # the process died of the input: the same as hanging
        self.timeouts += 1
        logger.warning("answer %.60r cannot be compared with %.60r in %g s: wrong", answer, expected, self.seconds)
        self._stop()
        return False

    def _start(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(START_SECONDS):
                raise RuntimeError(f"the answer checker did not start in {START_SECONDS:g} s")
            self._pipe.recv()
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None
