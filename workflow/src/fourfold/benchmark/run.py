"""Runs one workload through a client and says what came of each request."""

import copy
import time
from dataclasses import dataclass, field, replace

from fourfold.benchmark.client import Client
from fourfold.benchmark.metrics import Chunks
from fourfold.benchmark.workload import PlannedRequest, Workload
from fourfold.engine.requests import RequestOutput


@dataclass
class RequestRun:
    """A request and what the client saw of it. A request that was stopped has finish_reason `cancelled`."""

    planned: PlannedRequest
    output: RequestOutput
    chunks: Chunks = field(default_factory=Chunks)

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.output.finish_reason in ("stop", "length")


@dataclass
class WorkloadRun:
    """A workload's requests and its time from the first submission to the stop, in seconds."""

    workload: Workload
    requests: list[RequestRun]
    total_generation_time: float

    @property
    def output_tokens(self) -> int:
        """Tokens generated until the stop, those of cancelled requests included."""
        return sum(len(run.output.token_ids) for run in self.requests)


def run_workload(
    client: Client,
    workload: Workload,
    prompts: dict[str, list[int]],
    keep_first: int | None = None,
    max_seconds: float | None = None,
) -> WorkloadRun:
    """Submits all requests at once, stops after `keep_first` have finished or `max_seconds`, cancels the rest.

    Args:
        client: generates; it must have no other requests.
        workload: what to run.
        prompts: prompt token ids by problem id.
        keep_first: stop when this many have finished; None waits for all.
        max_seconds: stop after the first poll that ends later than this; None never does.
    """
    wanted = min(keep_first or len(workload.requests), len(workload.requests))
    start = time.perf_counter()
    runs: dict[str, RequestRun] = {}
    for planned in workload.requests:
        prompt = prompts[planned.problem.id]
        request_id = client.submit(prompt, planned.params)
        runs[request_id] = RequestRun(planned, RequestOutput(request_id, prompt, arrival_time=start))
    done: set[str] = set()
    while len(done) < wanted:
        changed = client.poll()
        now = time.perf_counter()
        for output in changed:
            output.check()
            run = runs[output.request_id]
            run.output = output
            if not run.chunks.times and output.first_token_time is not None:
                # The step that reads a prompt may decode too: the first token came before the others.
                run.chunks.see(1, output.first_token_time)
            run.chunks.see(len(output.token_ids), now)
            if output.finish_reason is not None:
                done.add(output.request_id)
        if max_seconds is not None and now - start >= max_seconds:
            break
        if not changed and len(done) < wanted:
            raise RuntimeError(f"the engine stopped with {len(done)} of {wanted} requests finished")
    total = time.perf_counter() - start
    for request_id, run in runs.items():
        if request_id not in done:
            # A copy of the moment of the stop: what the client does to the output afterwards is not measured.
            run.output = replace(copy.deepcopy(run.output), finish_reason="cancelled", finished_time=None)
            client.cancel(request_id)
    return WorkloadRun(workload, list(runs.values()), total)
