"""Metrics: hand-computed values, and properties that tie them to NumPy and to each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.benchmark import metrics
from fourfold.client.times import RequestTimes
from fourfold.engine.requests import SpeculationStats

FLOATS = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def request(tokens: int) -> RequestTimes:
    """Sent at 10, first token at 11, finished at 15."""
    return RequestTimes(10.0, [11.0, 15.0], [1, tokens - 1], 15.0)


def test_latencies_by_hand() -> None:
    done = request(9)
    assert metrics.ttft(done) == 1.0
    assert metrics.e2e_latency(done) == 5.0
    assert metrics.tpot(done) == 0.5  # 4 s for the 8 tokens after the first
    assert metrics.request_throughput(done) == pytest.approx(1.8)
    assert metrics.decode_throughput(done) == 2.0
    assert metrics.batch_throughput(18, 4.5) == 4.0


def test_what_cannot_be_computed_is_none() -> None:
    assert metrics.tpot(RequestTimes(10.0, [11.0], [1], 11.0)) is None
    waiting = RequestTimes(3.0)
    for metric in (metrics.ttft, metrics.tpot, metrics.e2e_latency, metrics.request_throughput):
        assert metric(waiting) is None
    assert metrics.batch_throughput(5, 0.0) is None
    assert metrics.percentile([], 50) is None
    assert metrics.mean([]) is None
    assert metrics.standard_deviation([]) is None
    assert metrics.accuracy([]) is None
    assert metrics.accuracy_standard_error([], []) is None
    assert metrics.acceptance_length(SpeculationStats()) is None
    assert metrics.acceptance_rate(SpeculationStats()) is None
    assert metrics.acceptance_rate_per_position(SpeculationStats()) == []


def test_chunk_and_token_latencies_differ_with_speculation() -> None:
    chunks = RequestTimes()
    for total, now in ((1, 1.0), (4, 1.6), (4, 1.8), (6, 2.0)):
        chunks.see(total, now)
    assert metrics.inter_chunk_latencies(chunks) == pytest.approx([0.6, 0.4])
    assert metrics.inter_token_latencies(chunks) == pytest.approx([0.2] * 3 + [0.2] * 2)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=2, max_size=20))
def test_mean_token_latency_is_tpot_when_the_first_chunk_is_one_token(deliveries: list[tuple[float, int]]) -> None:
    chunks, now, total = RequestTimes(), 0.0, 0
    for i, (gap, size) in enumerate(deliveries):
        now += gap
        total += 1 if i == 0 else size
        chunks.see(total, now)
    chunks.finished = now
    latencies = metrics.inter_token_latencies(chunks)
    assert len(latencies) == total - 1
    assert metrics.mean(latencies) == pytest.approx(metrics.tpot(chunks), abs=1e-9)


def test_acceptance_by_hand() -> None:
    stats = SpeculationStats(num_drafts=10, num_draft_tokens=30, accepted_per_position=[6, 4, 2])
    assert metrics.acceptance_length(stats) == pytest.approx(2.2)
    assert metrics.acceptance_rate(stats) == pytest.approx(0.4)
    assert metrics.acceptance_rate_per_position(stats) == pytest.approx([0.6, 0.4, 0.2])


def test_pooled_acceptance_is_not_the_mean_over_requests() -> None:
    short = SpeculationStats(2, 6, [2, 2, 2])
    long = SpeculationStats(18, 54, [9, 0, 0])
    pooled = metrics.pool([short, long, SpeculationStats()])
    assert (pooled.num_drafts, pooled.num_draft_tokens, pooled.accepted_per_position) == (20, 60, [11, 2, 2])
    assert metrics.acceptance_length(pooled) == pytest.approx(1 + 15 / 20)
    assert metrics.mean([short.acceptance_length, long.acceptance_length]) == pytest.approx((4 + 1.5) / 2)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=6))
def test_acceptance_properties(requests: list[list[int]]) -> None:
    stats = [
        SpeculationStats(len(steps), 3 * len(steps), [sum(n > i for n in steps) for i in range(3)])
        for steps in requests
    ]
    pooled = metrics.pool(stats)
    every = [n for steps in requests for n in steps]
    assert metrics.acceptance_length(pooled) == pytest.approx(1 + sum(every) / len(every))
    assert 1 <= metrics.acceptance_length(pooled) <= 4
    rates = metrics.acceptance_rate_per_position(pooled)
    assert rates == sorted(rates, reverse=True)
    assert 1 + sum(rates) == pytest.approx(metrics.acceptance_length(pooled))
    # The pooled length is the mean over requests weighted by their verifications.
    weighted = sum(s.acceptance_length * s.num_drafts for s in stats) / pooled.num_drafts
    assert weighted == pytest.approx(metrics.acceptance_length(pooled))


@given(FLOATS, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert metrics.percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_interval_by_hand() -> None:
    # Student's t with 2 degrees of freedom: 4.3027; the deviation of 1, 2, 3 is 1.
    assert metrics.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert metrics.interval([1.0]) is None
    assert metrics.interval([]) is None


@given(FLOATS)
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    assert metrics.mean(values) == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert metrics.standard_deviation(values) == pytest.approx(np.std(values), rel=1e-6, abs=1e-6)


def test_accuracy_and_its_error_by_hand() -> None:
    correct = [True, True, False, False]
    assert metrics.accuracy(correct) == 0.5
    # Four problems: sqrt(4 * 0.25) / 4. Two problems whose answers agree: sqrt(2 * 1) / 4. One: the binomial error.
    assert metrics.accuracy_standard_error(correct, list("abcd")) == pytest.approx(0.25)
    assert metrics.accuracy_standard_error(correct, list("aabb")) == pytest.approx(math.sqrt(2) / 4)
    assert metrics.accuracy_standard_error(correct, list("aaaa")) == pytest.approx(0.25)
    # All wrong: three problems, one right and one wrong answer assumed: sqrt(0.2 * 0.8 / 5).
    assert metrics.accuracy_standard_error([False] * 6, list("aabbcc")) == pytest.approx(math.sqrt(0.032))
    assert metrics.accuracy_standard_error([True] * 3, list("aaa")) == pytest.approx(math.sqrt(0.032))


@given(st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda values: len(set(values)) == 2))
def test_error_of_distinct_problems_is_binomial(correct: list[bool]) -> None:
    share = sum(correct) / len(correct)
    found = metrics.accuracy_standard_error(correct, [str(i) for i in range(len(correct))])
    assert found == pytest.approx(math.sqrt(share * (1 - share) / len(correct)))
