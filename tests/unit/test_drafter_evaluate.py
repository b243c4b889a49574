import math

from hypothesis import given
from hypothesis import strategies as st

from fourfold.drafter.evaluate import acceptance_row, pool, summarize
from fourfold.drafter.rows import to_csv
from fourfold.engine.requests import RequestOutput, SpeculationStats


def output(drafts: int, accepted: list[int]) -> RequestOutput:
    return RequestOutput("r", [1, 2], [3] * 5, speculation=SpeculationStats(drafts, 3 * drafts, accepted))


def test_acceptance_by_hand() -> None:
    # 10 drafts of 3 tokens: 6 accepted at the first position, 3 at the second, none at the third.
    row = acceptance_row([output(10, [6, 3, 0])], 3)
    assert row == {
        "prompt_tokens": 2,
        "output_tokens": 5,
        "drafts": 10,
        "draft_tokens": 30,
        "accepted": 9,
        "acceptance_length": 1.9,
        "acceptance_rate": 0.3,
        "accepted_0": 6,
        "acceptance_rate_0": 0.6,
        "conditional_acceptance_rate_0": 0.6,
        "accepted_1": 3,
        "acceptance_rate_1": 0.3,
        "conditional_acceptance_rate_1": 0.5,
        "accepted_2": 0,
        "acceptance_rate_2": 0.0,
        "conditional_acceptance_rate_2": 0.0,
    }


def test_the_pooled_length_and_the_mean_of_requests_differ() -> None:
    # 30 drafts that yield 2 each and 10 that yield 4 each: pooled 2.5, mean of requests 3.
    summary = summarize([output(30, [30, 0, 0]), output(10, [10, 10, 10])], 3)
    assert summary["acceptance_length"] == 2.5
    assert summary["acceptance_length_request_mean"] == 3.0
    assert summary["problems"] == 2


def test_a_request_without_drafts_has_no_rates_and_no_weight() -> None:
    empty = output(0, [])
    row = acceptance_row([empty], 2)
    assert (row["acceptance_length"], row["acceptance_rate_0"], row["accepted_1"]) == (None, None, 0)
    assert summarize([empty, output(2, [2, 2])], 2)["acceptance_length_request_mean"] == 3.0
    assert summarize([empty], 2)["acceptance_length_request_mean"] is None


COUNTS = st.builds(
    lambda drafts, shares: output(drafts, sorted((round(drafts * share) for share in shares), reverse=True)),
    st.integers(0, 50),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)


@given(outputs=st.lists(COUNTS, min_size=1, max_size=5))
def test_length_is_one_plus_the_sum_of_unconditional_rates(outputs: list[RequestOutput]) -> None:
    row = acceptance_row(outputs, 3)
    if row["drafts"] == 0:
        assert row["acceptance_length"] is None
        return
    rates = [row[f"acceptance_rate_{i}"] for i in range(3)]
    assert math.isclose(row["acceptance_length"], 1 + sum(rates))
    product = 1.0
    for i in range(3):
        conditional = row[f"conditional_acceptance_rate_{i}"]
        product *= conditional if conditional is not None else 0.0
        assert math.isclose(product, rates[i], abs_tol=1e-12)
    assert pool([out.speculation for out in outputs], 3).num_drafts == row["drafts"]


def test_rows_as_csv() -> None:
    assert to_csv([{"a": 1, "b": 1 / 3, "c": None}]) == "a,b,c\n1,0.333333,\n"
