"""The one definition of every metric: formula and unit. Names as in vLLM's and AIPerf's benchmarks.

Times are seconds, throughputs tokens per second. A value is None where its formula has nothing to divide by.
Everything is computed from what a client saw of each request, its `RequestTimes`.
"""

import math
from collections.abc import Sequence

from scipy.special import stdtrit

from fourfold.client.times import RequestTimes
from fourfold.engine.requests import SpeculationStats

PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95


def ttft(request: RequestTimes) -> float | None:
    """Time to first token, s: first chunk - sent; waiting in the server's queue counts."""
    return request.times[0] - request.sent if request.times else None


def e2e_latency(request: RequestTimes) -> float | None:
    """End-to-end latency, s: finished - sent."""
    return None if request.finished is None else request.finished - request.sent


def tpot(request: RequestTimes) -> float | None:
    """Time per output token, s: (e2e_latency - ttft) / (output tokens - 1); None for fewer than two tokens."""
    first, total = ttft(request), e2e_latency(request)
    return None if first is None or total is None or request.tokens < 2 else (total - first) / (request.tokens - 1)


def inter_token_latencies(request: RequestTimes) -> list[float]:
    """Inter-token latencies, s, one a token after the first chunk: a chunk's gap shared equally by its tokens.

    This is AIPerf's `inter_token_latency` seen token by token; vLLM's `itl` is `inter_chunk_latencies` here.
    """
    gaps = inter_chunk_latencies(request)
    return [gap / size for gap, size in zip(gaps, request.sizes[1:], strict=True) for _ in range(size)]


def inter_chunk_latencies(request: RequestTimes) -> list[float]:
    """Gaps between chunks, s. A verification that accepts drafts delivers several tokens after one gap."""
    return [after - before for before, after in zip(request.times, request.times[1:], strict=False)]


def request_throughput(request: RequestTimes) -> float | None:
    """Output tokens / e2e_latency, tokens/s: what one request's user sees, prefill and queue included."""
    latency = e2e_latency(request)
    return request.tokens / latency if latency else None


def decode_throughput(request: RequestTimes) -> float | None:
    """1 / tpot, tokens/s: the speed of one sequence once its first token is there."""
    per_token = tpot(request)
    return 1 / per_token if per_token else None


def batch_throughput(tokens: int, seconds: float) -> float | None:
    """Output tokens / seconds, tokens/s: all requests together, over the time from submission to the stop."""
    return tokens / seconds if seconds > 0 else None


def pool(stats: Sequence[SpeculationStats]) -> SpeculationStats:
    """Sums of the counts of several requests."""
    positions = max((len(s.accepted_per_position) for s in stats), default=0)
    accepted = [
        sum(s.accepted_per_position[i] for s in stats if i < len(s.accepted_per_position)) for i in range(positions)
    ]
    return SpeculationStats(sum(s.num_drafts for s in stats), sum(s.num_draft_tokens for s in stats), accepted)


def acceptance_length(stats: SpeculationStats) -> float | None:
    """Tokens per verification: 1 + accepted / drafts. The 1 is the bonus token that every verification yields."""
    return stats.acceptance_length


def acceptance_rate(stats: SpeculationStats) -> float | None:
    """Accepted draft tokens / draft tokens, 0 to 1."""
    return stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else None


def acceptance_rate_per_position(stats: SpeculationStats) -> list[float]:
    """[i] = verifications that accepted drafts 0 to i / verifications: unconditional, so it never rises with i."""
    return [count / stats.num_drafts for count in stats.accepted_per_position] if stats.num_drafts else []


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean."""
    return math.fsum(values) / len(values) if values else None


def standard_deviation(values: Sequence[float]) -> float | None:
    """Population standard deviation (divides by n), as the recipe prints it."""
    middle = mean(values)
    return None if middle is None else math.sqrt(math.fsum((v - middle) ** 2 for v in values) / len(values))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values, by Student's t; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    middle = math.fsum(values) / count
    variance = math.fsum((v - middle) ** 2 for v in values) / (count - 1)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)
    return middle - half, middle + half


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Percentile by linear interpolation between order statistics, as NumPy's default."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def accuracy(correct: Sequence[bool]) -> float | None:
    """Share of right answers, 0 to 1."""
    return sum(correct) / len(correct) if correct else None


def accuracy_standard_error(correct: Sequence[bool], problems: Sequence[str]) -> float | None:
    """Standard error of the accuracy, 0 to 1, clustered by problem.

    sqrt(sum over problems (sum over its answers (correct - accuracy))^2) / n: answers to one problem resemble each
    other, so they count for less than as many problems (Miller, arXiv 2411.00640, section 2.2). With a single problem
    it is sqrt(p (1 - p) / n), the error over answers to that problem. Where all answers are right, or all wrong, both
    would say 0; then it is sqrt(q (1 - q) / (m + 2)) with q = (right + 1) / (m + 2) for m problems (m answers, if there
    is one problem): one more of each kind is assumed (Agresti and Coull, 1998).
    """
    share = accuracy(correct)
    if share is None:
        return None
    sums: dict[str, float] = {}
    for value, problem in zip(correct, problems, strict=True):
        sums[problem] = sums.get(problem, 0.0) + value - share
    if share in (0.0, 1.0):
        count = len(sums) if len(sums) > 1 else len(correct)
        assumed = (share * count + 1) / (count + 2)
        return math.sqrt(assumed * (1 - assumed) / (count + 2))
    if len(sums) == 1:
        return math.sqrt(share * (1 - share) / len(correct))
    return math.sqrt(math.fsum(s * s for s in sums.values())) / len(correct)
