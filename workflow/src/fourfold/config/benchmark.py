"""The benchmark's workload."""

from typing import Annotated

from pydantic import Field, model_validator

from fourfold.config.base import Section, Seed
from fourfold.config.tools import ToolSettings

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class GoodputSettings(Section):
    """Limits, in seconds, that a request must keep to count as good; null sets none."""

    ttft: Seconds | None = None
    """Time to first token."""
    tpot: Seconds | None = None
    """Time per output token after the first."""
    e2e_latency: Seconds | None = None
    """From sending a request to its last token."""


class BenchmarkSettings(Section):
    """What is asked of each engine's server: the recipe's N generations at once, and requests at a rate."""

    problems: Positive = 4
    """How many benchmark problems to ask."""
    concurrency: list[Positive] = [1, 4]
    """Generations at once; each value is measured separately (a closed loop)."""
    request_rate: list[Seconds] = []
    """Requests a second, each value measured separately (an open loop): each problem is asked once, whether or not
    earlier requests have ended. Empty: none."""
    burstiness: Annotated[float, Field(gt=0)] = 1.0
    """How requests come at a rate: 1 as a Poisson process, less in bursts, more evenly."""
    goodput: GoodputSettings = GoodputSettings()
    """Limits that good requests keep; the number of these per second is reported."""
    keep_first: Positive | None = None
    """Stop a workload when this many generations have finished; null waits for all of them. Not at a request rate."""
    max_seconds: Seconds | None = None
    """Stop a workload after this many seconds; null never stops it."""
    same_problem: bool = True
    """The generations at once answer one problem, and the next follows when all have ended (the recipe's way); if
    false, each problem is asked once, and the next as soon as one has ended."""
    max_tokens: Positive = 256
    """Longest answer, in tokens; with tools, the output of code is part of it."""
    tools: ToolSettings | None = None
    """Let the model run code (`tools: {}` with all defaults); null does not. Needs what `fourfold sandbox` needs."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus probability."""
    repeats: Positive = 1
    """How often the whole benchmark is repeated, each time with other seeds; from 2 on, there are 95 % intervals."""
    warmup_requests: Annotated[int, Field(ge=0)] = 1
    """Short requests that run before each concurrency, uncounted: this many, or as many as run at once; 0 runs none."""
    seed: Seed = 0
    """Seed from which each request's own seed is derived."""

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkSettings":
        if not self.concurrency or len(set(self.concurrency)) != len(self.concurrency):
            raise ValueError("concurrency must name at least one value, each once")
        if len(set(self.request_rate)) != len(self.request_rate):
            raise ValueError("request_rate must name each value once")
        if not self.same_problem and max(self.concurrency) > self.problems:
            raise ValueError(
                f"concurrency {max(self.concurrency)} with same_problem false needs as many problems, but problems is "
                f"{self.problems}; raise it or set same_problem true"
            )
        if self.keep_first is not None and self.keep_first > min(self.concurrency):
            raise ValueError(
                f"keep_first is {self.keep_first}, more than the {min(self.concurrency)} generations that run at once"
            )
        return self


class ReportSettings(Section):
    """What the report shows."""

    title: str = "fourfold"
    """Title of the report."""
    plot_format: Annotated[str, Field(pattern=r"^(svg|png)$")] = "svg"
    """File format of the plots."""
    max_accuracy_drop: Annotated[float, Field(ge=0, le=100)] = 2.0
    """Accuracy gate: points of accuracy that an engine may lose against the first one."""
    max_kl: Annotated[float, Field(ge=0)] = 0.05
    """Accuracy gate: KL divergence of a quantised precision from bf16, in nats a token, that is allowed."""
