"""What goes wrong with one request on a GPU ends that request alone; prompts in parts; memory stays flat."""

import asyncio
import gc
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from random_load import Load
from tiny_models import run_all, tiny_engine

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.errors import FourfoldError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
PLANS = {"plain": None, "one beam": DraftPlan.fixed(1, 4), "a tree": DraftPlan.fixed(3, 3, draft_tokens=4)}
BROKEN = 319
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPTS = [[5 + i, 9, 30 + i] * (1 + i) for i in range(9)]
MIB = 2**20


def gpu_engine(folder: Path, plan: DraftPlan | None, **options: Any) -> LLMEngine:
    options = {"max_num_seqs": 5, "max_model_len": 400, "device": "cuda", "dtype": torch.float32, **options}
    return tiny_engine(folder, **(options if plan is None else {"drafter_seed": 3, "plan": plan, **options}))


def agree(outputs: dict[str, RequestOutput], expected: list[RequestOutput]) -> int:
    """How many sound requests have the tokens that they have alone; float32 leaves a near tie now and then."""
    return sum(outputs[str(i)].token_ids == alone.token_ids for i, alone in enumerate(expected))


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_nan_ends_the_requests_that_it_reaches(plan: DraftPlan | None, tmp_path: Path) -> None:
    """Captured steps too: what fills up a batch, and the step that is launched ahead, go on with broken rows."""
    engine = gpu_engine(tmp_path, plan, max_num_batched_tokens=64, enable_prefix_caching=True)
    expected = [engine.generate([prompt], [PARAMS])[0] for prompt in PROMPTS]
    engine.target.embedding[BROKEN, 3] = float("nan")
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
        engine.add_request([*prompt, BROKEN, *[4] * (100 * (i % 2))], PARAMS, f"broken {i}")
    outputs = run_all(engine)
    assert len(outputs) == 18
    for i in range(9):
        assert outputs[f"broken {i}"].token_ids == []
        assert "the scores of token 1 hold a NaN" in str(outputs[f"broken {i}"].error)
        assert outputs[str(i)].error is None
    assert agree(outputs, expected) >= 8


@pytest.mark.parametrize("plan", [PLANS["plain"], PLANS["one beam"]], ids=["plain", "one beam"])
def test_nans_everywhere_end_every_request_and_leaves_the_engine_usable(plan: DraftPlan | None, tmp_path: Path) -> None:
    engine = gpu_engine(tmp_path, plan)
    expected = engine.generate(PROMPTS, [PARAMS] * 9)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    for _ in range(4):
        engine.step()
    embedding = engine.target.embedding
    sound = embedding[:, 3].clone()
    embedding[:, 3] = float("nan")
    outputs = run_all(engine)
    assert all(output.finish_reason == "error" for output in outputs.values())
    embedding[:, 3] = sound
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    assert agree(run_all(engine), expected) >= 8


def test_a_prompt_for_which_there_is_no_memory_ends_alone(tmp_path: Path) -> None:
    """The allocator itself refuses: it may take hardly more than it has."""
    length = 32768
    engine = gpu_engine(
        tmp_path, None, shape={"max_position_embeddings": length}, max_model_len=length, max_num_batched_tokens=512
    )
    short = engine.generate(PROMPTS, [PARAMS] * 9)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    engine.add_request([7, 8] * (length // 2 - 20), PARAMS, "long")
    try:
        # A part at the end of the prompt needs a mask of 512 x 2 x 32768 numbers, 128 MiB.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MIB) / total)
        outputs = run_all(engine)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory while its prompt was read" in str(outputs["long"].error)
    assert agree(outputs, short) >= 8
    (again,) = engine.generate([[7, 8] * (length // 2 - 20)], [PARAMS])
    assert len(again.token_ids) == 20


@pytest.mark.parametrize("call", [0, 1], ids=["before the capture", "in the capture"])
def test_a_step_that_cannot_be_captured_ends_the_request_that_came_last(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = gpu_engine(tmp_path, PLANS["one beam"])
    expected = gpu_engine(tmp_path, PLANS["one beam"]).generate(PROMPTS, [PARAMS] * 9)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, PARAMS, str(i))
    engine.step()
    logits, calls = engine.target.logits, iter(range(10**9))

    def hungry(hidden: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return logits(hidden)

    monkeypatch.setattr(engine.target, "logits", hungry)
    outputs = run_all(engine)
    assert outputs["4"].finish_reason == "error"
    assert "out of memory while 5 requests were decoded" in str(outputs["4"].error)
    assert agree({**outputs, "4": expected[4]}, expected) >= 8


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("most", [64, 200])
def test_prompts_in_parts_give_the_same_tokens(plan: DraftPlan | None, most: int, tmp_path: Path) -> None:
    whole = gpu_engine(tmp_path, plan)
    parts = gpu_engine(tmp_path, plan, max_num_batched_tokens=most)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 319, (1 + 37 * i % 350,), generator=generator).tolist() for i in range(30)]
    params = [SamplingParams(max_tokens=5 + i % 20, temperature=0.7 * (i % 2), seed=i) for i in range(30)]
    expected, got = whole.generate(prompts, params), parts.generate(prompts, params)
    assert sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True)) >= 28


def test_the_cache_is_planned_within_a_share_of_the_card(tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.001
    with pytest.raises(FourfoldError, match=rf"GiB are free on cuda.* within gpu_memory_utilization {share:g}; "):
        gpu_engine(tmp_path, None, max_num_seqs=40_000, gpu_memory_utilization=share)
    assert gpu_engine(tmp_path, None).kv_cache_bytes > 0


def test_requests_are_cancelled_in_the_middle_of_replays(tmp_path: Path) -> None:
    """From another thread, at any moment: half of them; the others answer as alone."""
    pytest.importorskip("fastapi", reason="the server's libraries are not installed here")
    from fourfold.server.async_engine import AsyncEngine, Call

    engine = gpu_engine(tmp_path, PLANS["one beam"], max_num_batched_tokens=64, shape={"vocab_size": 320})
    prompts = [[1 + i % 300, 5, 9] * (1 + i % 40) for i in range(60)]
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    expected = engine.generate(prompts, [params] * 60)

    async def answer(call: Call) -> list[int]:
        tokens: list[int] = []
        async for _, delta in call.collector.deltas():
            tokens += delta.token_ids
        return tokens

    async def drive() -> list[list[int]]:
        server, ready, rng = AsyncEngine(lambda: engine, "tiny", 100), asyncio.Event(), random.Random(0)
        server.start(ready.set, ready.set)
        await ready.wait()
        calls = [server.submit([(prompt, params)], "prompt") for prompt in prompts]

        async def leave(call: Call) -> None:
            await asyncio.sleep(rng.random() * 0.5)
            call.close()

        answers = asyncio.gather(*(answer(call) for call in calls))
        await asyncio.gather(*(leave(call) for call in calls[::2]))
        found = await answers
        await server.stop()
        assert server.error is None
        return found

    found = asyncio.run(drive())
    pairs = list(zip(found, expected, strict=True))
    assert sum(tokens == alone.token_ids for tokens, alone in pairs[1::2]) >= 29
    assert sum(tokens == alone.token_ids[: len(tokens)] for tokens, alone in pairs[::2]) >= 29
    assert not engine.has_unfinished


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_ten_thousand_requests_leave_no_memory_behind(
    plan: DraftPlan | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Random lengths, cancellations and kinds of sampling; none is asked again, since ties may fall either way."""
    engine = gpu_engine(tmp_path, plan, max_model_len=128, max_num_batched_tokens=32)
    load = Load(engine, check_every=10**9)
    load.run(1000)  # steps are captured, allocators and caches fill up
    before, start = used(), time.monotonic()
    for _ in range(9):
        load.run(1000)
    seconds, after = time.monotonic() - start, used()
    with capsys.disabled():
        print(f"\n{load.made} requests, {load.tokens} tokens, {load.made * 0.9 / seconds:.0f} a second")
        for name, value in after.items():
            print(f"  {name}: {before[name]:.1f} → {value:.1f}")
    assert after["allocated, MiB"] - before["allocated, MiB"] < 1
    assert after["reserved, MiB"] - before["reserved, MiB"] < 32
    assert after["of the card, MiB"] - before["of the card, MiB"] < 64
    assert after["Python objects"] - before["Python objects"] < 1000


def used() -> dict[str, float]:
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated, MiB": torch.cuda.memory_allocated() / MIB,
        "reserved, MiB": torch.cuda.memory_reserved() / MIB,
        "of the card, MiB": (total - free) / MIB,
        "Python objects": float(len(gc.get_objects())),
    }
