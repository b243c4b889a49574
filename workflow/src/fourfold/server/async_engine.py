"""The engine behind an event loop: one thread computes, the loop only hands requests in and takes tokens out.

The thread sleeps while nothing runs. Between two steps it takes in what the loop has sent, so that a request that was
cancelled frees its slot before the next step.

Both threads take turns at the interpreter, so what the loop spends on sending, an engine of quick steps loses (a slow
step computes outside the interpreter meanwhile). The tokens of quick steps therefore go out together, as often as the
loop's share of the time allows. First tokens and ends never wait.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from queue import SimpleQueue
from typing import Any

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.errors import FourfoldError
from fourfold.progress import logger
from fourfold.server.collector import Collector, Delta
from fourfold.server.errors import ApiError, bad_request, failed, unavailable
from fourfold.server.metrics import Metrics
from fourfold.server.text import TextThread, shown_length

RETRY_AFTER_SECONDS = 1
QUICK_STEP_SECONDS = 0.005
"""Only the tokens of steps that take less than this wait for others."""
LOOP_SHARE = 0.02
"""The share of the processor time of one core that the loop may take beside quick steps."""
MAX_PAUSE_SECONDS = 0.05
"""No token waits longer than this: a stream still reads smoothly."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    collector: Collector
    number: int
    """Its place among the requests of its call."""
    arrival: float
    output: RequestOutput | None = None
    """The engine's, once it has begun."""
    sent_text: int = 0
    sent_tokens: int = 0
    steps: int = 0
    """Steps that the loop has not been told of."""
    grew: float | None = None
    """When the loop last saw new tokens."""
    ended: bool = False
    """Whether the loop knows of its end."""


class AsyncEngine:
    """Requests from an event loop to an `LLMEngine` in a thread of its own.

    All methods are the loop's, except those that say otherwise.
    """

    def __init__(self, load: Callable[[], LLMEngine], model_name: str, max_waiting: int) -> None:
        """Starts nothing yet.

        Args:
            load: makes the engine, in its thread.
            model_name: label of the metrics.
            max_waiting: requests that may wait for a slot; more are refused.
        """
        self._load, self._max_waiting = load, max_waiting
        self._inbox: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._open: set[Ticket] = set()
        self._ids = itertools.count()
        self._stopping = False
        # Requests with something new, in order.
        self._grown: dict[Ticket, None] = {}
        self._due = self._loop_seconds = 0.0
        self._engine: LLMEngine | None = None
        self._text: TextThread | None = None
        self.error: BaseException | None = None
        """What ended the engine, if it has failed."""
        self.metrics = Metrics(
            model_name,
            {
                "num_requests_running": lambda: self._engine.num_running if self._engine else 0,
                "num_requests_waiting": self._waiting,
                "kv_cache_usage_perc": lambda: (
                    self._engine.num_running / self._engine.max_num_seqs if self._engine else 0
                ),
            },
        )

    def start(self, on_ready: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Loads the engine and runs it, in the thread; `on_failure` is called once if either fails."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(on_ready, on_failure), name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends what still runs, and the thread."""
        self._inbox.put(self._stop)
        # An engine that is still being loaded cannot be waited for: the process ends over it.
        if self._engine is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def engine(self) -> LLMEngine:
        """The engine, for what never changes of it. Raises ApiError (503) while there is none."""
        if self.error is not None:
            raise unavailable("the engine has failed")
        if self._engine is None:
            raise unavailable("the engine is still loading")
        return self._engine

    @property
    def text(self) -> TextThread:
        """The tokenizer. Raises ApiError (503) while there is none."""
        assert self.engine is not None
        assert self._text is not None
        return self._text

    def submit(self, requests: list[tuple[list[int], SamplingParams]], field: str) -> "Call":
        """Hands in the requests of a call, all or none; `field` of the body is what held the prompts.

        Raises ApiError: 400 when one does not fit the engine, 429 when the queue is full.
        """
        engine = self.engine
        for prompt, params in requests:
            try:
                engine.check_request(prompt, params)
            except FourfoldError as error:
                too_long = len(prompt) + params.max_tokens > engine.max_model_len
                raise bad_request(f"{field}: {error}", field, "context_length_exceeded" if too_long else None) from None
        capacity = engine.max_num_seqs + self._max_waiting
        if len(requests) > capacity:
            raise bad_request(f"n: {len(requests)} answers in one call; this server takes {capacity}", "n")
        if len(self._open) + len(requests) > capacity:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{engine.max_num_seqs} requests run and {self._max_waiting} wait at most; ask again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        collector, now = Collector(len(requests)), time.perf_counter()
        tickets = [
            Ticket(f"r{next(self._ids)}", prompt, params, collector, number, now)
            for number, (prompt, params) in enumerate(requests)
        ]
        self._open.update(tickets)
        for ticket in tickets:
            self._inbox.put(partial(self._add, ticket))
        return Call(self, collector, tickets)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request before the engine's next step; does nothing if it has ended."""
        if not ticket.ended:
            self._inbox.put(partial(self._cancel, ticket))

    def _waiting(self) -> int:
        return max(0, len(self._open) - (self._engine.num_running if self._engine else 0))

    def _deliver(self, news: list[tuple[Ticket, Delta, int]]) -> None:
        """Takes what steps yielded, (request, what is new, of how many steps), and says when more may come."""
        # All that the loop has done since the last time, which was mostly to send.
        before, self._loop_seconds = self._loop_seconds, time.thread_time()
        pause = (self._loop_seconds - before) * (1 / LOOP_SHARE - 1)
        self._due = time.perf_counter() + min(pause, MAX_PAUSE_SECONDS)
        for ticket, delta, steps in news:
            if delta.token_ids:
                first = ticket.output if ticket.grew is None else None
                ticket.grew = self.metrics.grew(len(delta.token_ids), first, ticket.grew, steps)
            if delta.last is not None:
                ticket.ended = True
                self._open.discard(ticket)
                self.metrics.ended(delta.last)
                if delta.last.error is not None:
                    ticket.collector.fail(failed(delta.last.error))
            ticket.collector.put(ticket.number, delta)

    def _failed(self, error: BaseException, on_failure: Callable[[], None]) -> None:
        self.error = error
        for ticket in self._open:
            ticket.collector.fail(unavailable("the engine has failed"))
        self._open.clear()
        on_failure()

    # From here on: the engine's thread.

    def _run(self, on_ready: Callable[[], None], on_failure: Callable[[], None]) -> None:
        try:
            engine = self._load()
            self._text = TextThread(engine.tokenizer)
            self._engine = engine
            self._call(on_ready)
            while not self._stopping:
                # With nothing to compute, the thread sleeps until something comes.
                while not self._inbox.empty() or not engine.has_unfinished:
                    self._inbox.get()()
                    if self._stopping:
                        break
                else:
                    begin = time.perf_counter()
                    outputs = engine.step()
                    self._publish(outputs, time.perf_counter() - begin)
        except BaseException as error:
            logger.debug("the engine's thread ends", exc_info=True)
            self._call(self._failed, error, on_failure)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _add(self, ticket: Ticket) -> None:
        self.engine.add_request(ticket.prompt_token_ids, ticket.params, ticket.id)
        self._tickets[ticket.id] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.id, None) is None:
            return
        self._flush()
        self.engine.cancel(ticket.id)
        # A request that never began has no output.
        output = ticket.output or RequestOutput(ticket.id, ticket.prompt_token_ids, arrival_time=ticket.arrival)
        output.finish_reason = "cancelled"
        output.finished_time = output.finished_time or time.perf_counter()
        self._call(self._deliver, [(ticket, Delta(last=output), 0)])

    def _stop(self) -> None:
        for ticket in list(self._tickets.values()):
            self._cancel(ticket)
        self._stopping = True

    def _publish(self, outputs: list[RequestOutput], seconds: float) -> None:
        """Notes what a step of so many seconds yielded; sends it to the loop now or with what later steps yield."""
        urgent = seconds > QUICK_STEP_SECONDS
        for output in outputs:
            ticket = self._tickets[output.request_id]
            if ticket.output is None:
                ticket.output, output.arrival_time, urgent = output, ticket.arrival, True
            if output.finish_reason is not None:
                del self._tickets[output.request_id]
                urgent = True
            ticket.steps += 1
            self._grown[ticket] = None
        if urgent or time.perf_counter() >= self._due:
            self._flush()

    def _flush(self) -> None:
        """Sends to the loop what it has not been told of, in one go."""
        news = []
        for ticket in self._grown:
            output, stop = ticket.output, ticket.params.stop
            assert output is not None
            ended = output.finish_reason is not None
            shown = len(output.text) if ended else shown_length(output.text, stop)
            delta = Delta(
                output.text[ticket.sent_text : shown],
                output.token_ids[ticket.sent_tokens :],
                output.logprobs[ticket.sent_tokens :],
                output if ended else None,
            )
            news.append((ticket, delta, ticket.steps))
            ticket.sent_text, ticket.sent_tokens, ticket.steps = shown, len(output.token_ids), 0
        self._grown.clear()
        if news:
            self._call(self._deliver, news)


@dataclass
class Call:
    """The requests of one HTTP call."""

    engine: AsyncEngine
    collector: Collector
    tickets: list[Ticket]

    def close(self) -> None:
        """Ends those that still run: the client has gone, or has its answer."""
        for ticket in self.tickets:
            self.engine.cancel(ticket)
