"""The benchmark's workload."""

from typing import Annotated

from pydantic import Field, model_validator

from fourfold.config.base import Section, Seed

Positive = Annotated[int, Field(ge=1)]


class BenchmarkSettings(Section):
    """The recipe's workload: N generations at once, stopped after the first K finish or after T seconds."""

    problems: Positive = 4
    """How many benchmark problems to run; each is a workload of its own."""
    concurrency: list[Positive] = [1, 4]
    """Generations at once; each value is measured separately."""
    keep_first: Positive | None = None
    """Stop a workload when this many generations have finished; null waits for all of them."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop a workload after this many seconds; null never stops it."""
    same_problem: bool = True
    """Generations of a workload answer one problem (the recipe's way); if false, each its own problem."""
    max_tokens: Positive = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus probability."""
    repeats: Positive = 1
    """How often the whole benchmark is repeated, each time with other seeds."""
    warmup_requests: Annotated[int, Field(ge=0)] = 1
    """Short requests that run before each concurrency, uncounted: this many, or as many as run at once; 0 runs none."""
    seed: Seed = 0
    """Seed from which each request's own seed is derived."""

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkSettings":
        if not self.concurrency or len(set(self.concurrency)) != len(self.concurrency):
            raise ValueError("concurrency must name at least one value, each once")
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
