"""The server's small parts: what may be shown of a text, collected deltas, the record of acceptance."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.engine import RequestOutput, SpeculationStats
from fourfold.server.collector import Collector, Delta
from fourfold.server.text import shown_length
from fourfold.server.usage import acceptance


@given(
    pieces=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=12),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_what_is_shown_is_never_taken_back(pieces: list[str], stop: list[str]) -> None:
    """A text that grows piece by piece, cut at its first stop string as the engine cuts it."""
    text, shown = "", ""
    for piece in pieces:
        text += piece
        cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
        if cut is not None:
            assert text[:cut].startswith(shown)
            return
        length = shown_length(text, stop)
        assert text[:length].startswith(shown)
        shown = text[:length]
        # Only what a stop string begins with is held back.
        assert length == len(text) or any(s.startswith(text[length:]) for s in stop)


def test_what_piles_up_comes_in_one_piece() -> None:
    async def collected() -> list[tuple[int, str, list[int], bool]]:
        collector = Collector(2)
        collector.put(0, Delta("", [1]))
        collector.put(0, Delta("a", [2, 3]))
        collector.put(1, Delta("", [7]))
        found = []
        async for number, delta in collector.deltas():
            found.append((number, delta.text, delta.token_ids, delta.last is not None))
            if len(found) == 1:
                collector.put(0, Delta("b", [4], last=RequestOutput("0", [1])))
                collector.put(1, Delta("", [8], last=RequestOutput("1", [1])))
        return found

    assert asyncio.run(collected()) == [(0, "a", [1, 2, 3], False), (1, "", [7, 8], True), (0, "b", [4], True)]


def test_a_failure_reaches_the_reader() -> None:
    async def read() -> None:
        collector = Collector(1)
        collector.fail(ValueError("broken"))
        async for _ in collector.deltas():
            raise AssertionError

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(read())


def test_the_record_of_acceptance_counts_verifications() -> None:
    """Five verifications that accepted 3, 1, 0, 0 and 1 of three drafts each."""
    record = acceptance(SpeculationStats(5, 15, [3, 1, 1]), 3)
    assert record == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 5 / 15,
        "acceptance_histogram": [2, 2, 0, 1],
        "num_spec_steps": 5,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 15,
        "num_spec_tokens": 3,
    }
    assert acceptance(SpeculationStats(), 3) is None
    assert acceptance(SpeculationStats(2, 0, []), 3)["acceptance_histogram"] == [2, 0, 0, 0]  # type: ignore[index]
