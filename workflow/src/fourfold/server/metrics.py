"""Prometheus metrics under vLLM's names, so that its dashboards and `vllm bench serve` read them.

Source of the names: vLLM, docs/usage/metrics.md.
"""

import time
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fourfold.engine.requests import RequestOutput

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two steps that gave a request tokens; with drafts a step may give several.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "From a request's arrival until it had a slot.",
    "request_prefill_time_seconds": "From a request's slot to its first token.",
    "request_decode_time_seconds": "From a request's first token to its end.",
}
PEAK_MEMORY = "fourfold:gpu_peak_memory_bytes"
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "prefix_cache_queries": "Prompt tokens that were looked for in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that were in the prefix cache, and not read again.",
    "generation_tokens": "Tokens generated.",
    "spec_decode_num_drafts": "Verifications that had draft tokens to check.",
    "spec_decode_num_draft_tokens": "Draft tokens checked.",
    "spec_decode_num_accepted_tokens": "Draft tokens accepted.",
}


class Metrics:
    """Counts what the engine does; belongs to the event loop. Drafts count when their request ends."""

    def __init__(self, model_name: str, gauges: dict[str, Callable[[], float]]) -> None:
        self._registry = CollectorRegistry()
        labels, values = ["model_name"], [model_name]
        for name, read in gauges.items():
            Gauge(f"vllm:{name}", "Now.", labels, registry=self._registry).labels(*values).set_function(read)
        # PyTorch's own count; 0 without a GPU.
        Gauge(PEAK_MEMORY, "Most that was allocated since the start.", registry=self._registry).set_function(
            torch.cuda.max_memory_allocated
        )
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, labels, buckets=SECONDS, registry=self._registry).labels(*values)
            for name, text in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"vllm:{name}", text, labels, registry=self._registry).labels(*values)
            for name, text in COUNTERS.items()
        }

        def labelled(name: str, text: str, label: str) -> Callable[[str], Counter]:
            counter = Counter(f"vllm:{name}", text, [*labels, label], registry=self._registry)
            return lambda value: counter.labels(*values, value)

        self._ended = labelled("request_success", "Requests ended.", "finished_reason")
        self._accepted = labelled(
            "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by position.", "position"
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended(reason)  # present from the start, so that a rate has a beginning

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def grew(self, tokens: int, first: RequestOutput | None, previous: float | None, steps: int = 1) -> float:
        """Counts new tokens of a request; returns when that was, seconds of `time.perf_counter`.

        Args:
            tokens: how many are new.
            first: the request's output, if these are its first tokens.
            previous: what the last call for this request returned.
            steps: how many steps gave them, of which the mean time counts, once.
        """
        now = time.perf_counter()
        self._counters["generation_tokens"].inc(tokens)
        if first is not None and first.first_token_time is not None:
            for name in ("prompt_tokens", "prefix_cache_queries"):
                self._counters[name].inc(len(first.prompt_token_ids))
            self._counters["prefix_cache_hits"].inc(first.num_cached_tokens)
            self._histograms["time_to_first_token_seconds"].observe(first.first_token_time - first.arrival_time)
        elif previous is not None:
            self._histograms["inter_token_latency_seconds"].observe((now - previous) / steps)
        return now

    def ended(self, output: RequestOutput) -> None:
        """Counts a request that has ended, in whatever way."""
        assert output.finished_time is not None
        self._ended("abort" if output.finish_reason == "cancelled" else str(output.finish_reason)).inc()
        speculation = output.speculation
        self._counters["spec_decode_num_drafts"].inc(speculation.num_drafts)
        self._counters["spec_decode_num_draft_tokens"].inc(speculation.num_draft_tokens)
        self._counters["spec_decode_num_accepted_tokens"].inc(speculation.num_accepted_tokens)
        for position, accepted in enumerate(speculation.accepted_per_position):
            self._accepted(str(position)).inc(accepted)
        observe = {name: histogram.observe for name, histogram in self._histograms.items()}
        observe["e2e_request_latency_seconds"](output.finished_time - output.arrival_time)
        if output.scheduled_time is not None and output.first_token_time is not None:
            observe["request_queue_time_seconds"](output.scheduled_time - output.arrival_time)
            observe["request_prefill_time_seconds"](output.first_token_time - output.scheduled_time)
            observe["request_decode_time_seconds"](output.finished_time - output.first_token_time)
