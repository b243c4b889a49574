"""The scheduler under load: every answer its own, every slot returned, first come first served, and memory flat."""

import gc
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_load import Load, request
from tiny_models import tiny_engine

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.errors import FourfoldError

Engines = dict[str, LLMEngine]
ENGINES = ("plain", "drafting", "beams")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines over one model: without a drafter; with one beam, and prompts in parts; with several beams, the fewer
    the more requests run."""
    folder = tmp_path_factory.mktemp("model")
    plan = DraftPlan({1: DraftShape(4, 4), 2: DraftShape(2, 3), 4: DraftShape(1, 4), 5: NO_DRAFTS})
    return {
        "plain": tiny_engine(folder, max_num_seqs=5),
        "drafting": tiny_engine(folder, drafter_seed=3, max_num_seqs=5, max_num_batched_tokens=16),
        "beams": tiny_engine(folder, drafter_seed=3, max_num_seqs=5, plan=plan),
    }


def test_hundreds_of_requests_answer_as_alone(engines: Engines) -> None:
    loads = {name: Load(engine, seed=1, check_every=3) for name, engine in engines.items()}
    for load in loads.values():
        load.run(100)
        before = count_objects()
        load.run(300)
        # A request that left anything behind would show as hundreds.
        assert count_objects() - before < 100
        ended = load.stopped + load.full + load.cancelled_running + load.cancelled_waiting
        assert ended == load.made == 400
        assert min(load.stopped, load.full, load.cancelled_running, load.cancelled_waiting, load.checked) > 0
    assert loads["plain"].checksum == loads["drafting"].checksum == loads["beams"].checksum != 0


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 10**6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    max_size=30,
)


@given(actions=ACTIONS, name=st.sampled_from(ENGINES))
@settings(max_examples=100, deadline=None)
def test_any_order_of_events_gives_each_request_its_own_answer(
    engines: Engines, actions: list[tuple[str, int]], name: str
) -> None:
    engine = engines[name]
    numbers: dict[str, int] = {}
    outputs, admitted = {}, []
    cancelled: set[str] = set()
    for kind, value in [*actions, ("step", 10_000)]:
        if kind == "add":
            identity = engine.add_request(*request(7, value))
            numbers[identity] = value
        elif kind == "cancel" and numbers:
            identity = list(numbers)[value % len(numbers)]
            if engine.cancel(identity):
                cancelled.add(identity)
        elif kind == "step":
            for _ in range(value):
                if not engine.has_unfinished:
                    break
                for output in engine.step():
                    if output.request_id not in outputs:
                        admitted.append(output.request_id)
                    outputs[output.request_id] = output
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert admitted == [identity for identity in numbers if identity in outputs], "not first come, first served"
    assert numbers.keys() - outputs.keys() <= cancelled, "a request that nobody cancelled has no answer"
    for identity, output in outputs.items():
        (alone,) = engine.generate(*([part] for part in request(7, numbers[identity])))
        if output.finish_reason == "cancelled":
            assert identity in cancelled
            assert output.token_ids == alone.token_ids[: len(output.token_ids)]
        else:
            assert output.token_ids == alone.token_ids
            assert (output.text, output.finish_reason) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize("name", ENGINES)
def test_a_stream_of_short_requests_does_not_hold_up_a_long_one(engines: Engines, name: str) -> None:
    engine = engines[name]
    long = engine.add_request([5, 6], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(2 * 20):
        engine.add_request([7], SamplingParams(max_tokens=1))
        if any(output.request_id == long and output.finish_reason for output in engine.step()):
            break
    else:
        pytest.fail("twenty tokens took more than forty steps")
    while engine.has_unfinished:
        engine.step()


def test_a_step_admits_no_more_than_its_free_slots(engines: Engines) -> None:
    engine = engines["plain"]
    for _ in range(50):
        engine.add_request([7], SamplingParams(max_tokens=1))
    assert len(engine.step()) == engine.max_num_seqs
    while engine.has_unfinished:
        engine.step()


def test_an_id_belongs_to_one_request_at_a_time(engines: Engines) -> None:
    engine = engines["plain"]
    for end in ("run", "cancel while waiting", "cancel while running"):
        engine.add_request([5], SamplingParams(max_tokens=4), "mine")
        with pytest.raises(FourfoldError, match="request mine has not ended yet; give another id"):
            engine.add_request([6], SamplingParams(max_tokens=4), "mine")
        if end == "cancel while running":
            engine.step()
        if end != "run":
            assert engine.cancel("mine")
        while engine.has_unfinished:
            engine.step()


def test_a_callback_may_cancel_any_request(engines: Engines) -> None:
    engine = engines["plain"]
    finished = []

    def watch(output: RequestOutput) -> None:
        # The third of eight cancels the first, which runs, and the seventh, which waits.
        if output.prompt_token_ids == [7] and len(output.token_ids) == 3:
            number = int(output.request_id.removeprefix("request-"))
            assert engine.cancel(f"request-{number - 2}")
            assert engine.cancel(f"request-{number + 4}")

    params = [SamplingParams(max_tokens=6, ignore_eos=True)] * 8
    outputs = engine.generate([[5 + i] for i in range(8)], params, on_output=watch, on_finish=finished.append)
    assert [output.finish_reason for output in outputs].count("cancelled") == 2
    assert sorted(output.prompt_token_ids for output in finished) == [[5 + i] for i in range(8)]
    assert not engine.has_unfinished


def count_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ENGINES)
def test_ten_thousand_requests_leave_nothing_behind(engines: Engines, name: str, capsys: pytest.CaptureFixture) -> None:
    """`docs/exactness.md` has the command and what it printed."""
    load, process = Load(engines[name], check_every=20), psutil.Process()
    load.run(1000)  # allocators and caches fill up
    objects, memory, start = count_objects(), process.memory_info().rss, time.monotonic()
    for _ in range(9):
        load.run(1000)
    seconds = time.monotonic() - start
    more_objects, more_memory = count_objects() - objects, process.memory_info().rss - memory
    with capsys.disabled():
        print(
            f"\n{name}: {load.made} requests, {load.tokens} tokens; {load.stopped} stopped, {load.full} full, "
            f"{load.cancelled_running} cancelled while running, {load.cancelled_waiting} while waiting; "
            f"{load.checked} asked again alone, none differs; checksum {load.checksum:016x}; "
            f"from request 1000 on ({seconds:.0f} s): {more_objects:+d} objects, {more_memory / 2**20:+.1f} MiB of "
            f"{memory / 2**20:.0f}"
        )
    assert more_objects < 200
    assert more_memory < 16 * 2**20
