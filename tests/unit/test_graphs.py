"""The captured decoding step as plain calls, through Triton's interpreter: its buffers, its padding, its tokens.

Capturing and replaying it is in tests/gpu.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from random_load import VOCABULARY, Load
from tiny_models import tiny_drafter, tiny_engine
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import DraftPlan, DraftShape
from fourfold.engine.graphs import DecodeGraphs, padded_batch
from fourfold.engine.sampling import SamplingBatch
from fourfold.modeling.draft_decode import DraftChain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/gpu captures the step")


class Uncaptured(DecodeGraphs):
    """Runs the step's body where a graph would be replayed."""

    def _capture(self, size: int, shape: DraftShape) -> Any:
        class Step:
            def replay(step) -> None:
                step.results = self.body(size, shape)

        class Result:
            """One of the two results of the newest replay, where a graph has a place that it writes to."""

            def __init__(self, which: int) -> None:
                self.which = which

            def __getitem__(self, rows: Any) -> Tensor:
                return step.results[self.which][rows]

        return (step := Step()).replay, Result(0), Result(1)


def engines(path: Path, vocab_size: int = 8, **options: Any) -> tuple[LLMEngine, LLMEngine]:
    """The reference, and one that decodes as it does on a GPU, and reads prompts together."""
    shape = {"vocab_size": vocab_size, "num_hidden_layers": 1}
    eager, captured = (tiny_engine(path, shape=shape, **options) for _ in range(2))
    target, chain = captured.target, None
    if (seed := options.get("drafter_seed")) is not None:
        chain = DraftChain(tiny_drafter(target, seed), target.embedding)
    captured.decoder.graphs = Uncaptured(
        target, captured.drafter, captured._cache, captured._hidden, captured.max_num_seqs, chain
    )
    captured.prefill.max_rows = 2048
    return eager, captured


def requests(mixed: bool, logprobs: int | None = None) -> tuple[list[list[int]], list[SamplingParams]]:
    """Of different lengths; greedy, or greedy and sampled by turns."""
    prompts = [[1 + i, 5, 3] * (1 + i % 2) for i in range(4)]
    params = [
        SamplingParams(
            max_tokens=3 + 2 * i,
            temperature=1.5 * (i % 2) * mixed,
            top_p=0.9 if i == 1 else 1.0,
            seed=i,
            logprobs=logprobs,
        )
        for i in range(4)
    ]
    return prompts, params


CHAIN, TREE = DraftPlan.fixed(1, 4), DraftPlan.fixed(3, 4, draft_tokens=5)


@pytest.mark.parametrize(
    ("plan", "mixed"), [(None, True), (CHAIN, False), (CHAIN, True), (TREE, False), (TREE, True)], ids=str
)
@pytest.mark.parametrize("logprobs", [2, None])
def test_the_step_equals_the_eager_one(
    plan: DraftPlan | None, mixed: bool, logprobs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than slots: sequences end, move to another slot, and are admitted. Without logprobs, steps are
    launched ahead."""
    drafter = {} if plan is None else {"drafter_seed": 3, "plan": plan}
    eager, captured = engines(tmp_path, max_num_seqs=2, max_model_len=64, **drafter)
    prompts, params = requests(mixed, logprobs)
    expected = eager.generate(prompts, params)
    monkeypatch.setattr(SamplingBatch, "in_kernels", property(lambda batch: not (batch.has_top_k or batch.has_top_p)))
    got = captured.generate(prompts, params)
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    for a, b in zip(got, expected, strict=True):
        assert [p.token for p in a.logprobs] == (a.token_ids if logprobs else [])
        assert [p.logprob for p in a.logprobs] == pytest.approx([p.logprob for p in b.logprobs], abs=1e-4)
    if plan is not None:
        ours, theirs = ([o.speculation.num_accepted_tokens for o in outputs] for outputs in (got, expected))
        # Where one device searches for beams, the other grows leaves on a trunk.
        assert ours == theirs or plan is TREE
        assert sum(ours) > 0


def test_what_comes_between_steps_finds_no_token_missing(tmp_path: Path) -> None:
    """Requests are added and cancelled while a step is under way; every output that grew or ended is told of."""
    eager, captured = engines(tmp_path, drafter_seed=1, max_num_seqs=3, max_model_len=64)
    assert captured.decoder.graphs is not None
    prompts = [[1 + i, 5] for i in range(7)]
    params = [SamplingParams(max_tokens=4 + 3 * i, seed=i, temperature=i % 2) for i in range(7)]
    expected = [output.token_ids for output in eager.generate(prompts, params)]
    told: dict[str, int] = {}
    ahead, steps, names = 0, 0, iter(range(7))

    def add() -> None:
        i = next(names)
        captured.add_request(prompts[i], params[i], str(i))

    for _ in range(3):
        add()
    while captured.has_unfinished:
        for output in captured.step():
            tokens = expected[int(output.request_id)]
            assert output.token_ids == tokens[: len(output.token_ids)]
            if output.finish_reason in ("stop", "length"):
                assert output.token_ids == tokens
            told[output.request_id] = len(output.token_ids)
        ahead += captured.decoder.is_ahead
        steps += 1
        if steps in (2, 3, 5, 6):
            add()
        if steps == 4:
            assert captured.cancel("2")
            assert not captured.cancel("2")
    assert ahead > 3
    assert not captured.decoder.is_ahead
    assert all(told[name] == len(expected[int(name)]) for name in told if name != "2")


@pytest.mark.parametrize("plan", [CHAIN, TREE], ids=str)
def test_padding_leaves_the_sequences_alone(plan: DraftPlan, tmp_path: Path) -> None:
    """Five sequences in a step made for six: the sixth row stays at its first positions, in a slot that is free. Of
    shared drafts it has none while the others can have them."""
    eager, captured = engines(tmp_path, drafter_seed=1, max_num_seqs=8, max_model_len=64, plan=plan)
    prompts, params = [[1 + i, 5] for i in range(5)], [SamplingParams(max_tokens=20, ignore_eos=True)] * 5
    for prompt, p in zip(prompts, params, strict=True):
        captured.add_request(prompt, p)
    captured.step()
    before = captured._cache.data[:, 5:].clone()
    captured.runs_ahead = False
    for _ in range(3):
        captured.step()
    changed = (captured._cache.data[:, 5:] != before).any(0).any(1).any(-1)
    assert changed.nonzero().tolist() == [[0, place] for place in range(4 if plan is CHAIN else 1)]
    running = [sequence.output.token_ids for sequence in captured._running]
    expected = [output.token_ids for output in eager.generate(prompts, params)]
    assert [tokens[: len(ours)] for tokens, ours in zip(expected, running, strict=True)] == running


def test_sequences_share_the_drafts_of_a_step(tmp_path: Path) -> None:
    """Each step verifies as many; how many are whose follows the drafter, and is counted."""
    eager, captured = engines(tmp_path, drafter_seed=3, max_num_seqs=4, max_model_len=64, plan=TREE)
    prompts, params = [[1 + i, 5, 3] for i in range(4)], [SamplingParams(max_tokens=24, ignore_eos=True)] * 4
    for prompt, p in zip(prompts, params, strict=True):
        captured.add_request(prompt, p)
    captured.runs_ahead = False
    totals = [[0] * 4]
    while len(totals) < 5:
        captured.step()
        now = [sequence.output.speculation.num_draft_tokens for sequence in captured._running]
        if any(now):  # the first step reads prompts
            totals.append(now)
    shares = [[new - old for old, new in zip(*pair, strict=True)] for pair in pairwise(totals)]
    assert [sum(share) for share in shares] == [4 * 5] * 4
    assert len({tuple(share) for share in shares}) > 1
    assert any(len(set(share)) > 1 for share in shares), "not all have as many"
    outputs = eager.generate(prompts, params)
    for sequence, output in zip(captured._running, outputs, strict=True):
        assert sequence.output.token_ids == output.token_ids[: len(sequence.output.token_ids)]


def test_padded_batch() -> None:
    assert [padded_batch(n, 40) for n in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17, 25, 33, 40)] == [
        *(1, 2, 3, 4, 6, 8, 8, 12, 12, 16, 24, 32, 40, 40)
    ]
    assert padded_batch(9, 10) == 10
    assert all((padded_batch(n, 64) - n) * 3 < padded_batch(n, 64) for n in range(1, 65))


@pytest.mark.parametrize("plan", [None, DraftPlan.fixed(1, 3), TREE], ids=["plain", "one beam", "shared drafts"])
def test_requests_that_come_and_are_cancelled_are_told_of_once(plan: DraftPlan | None, tmp_path: Path) -> None:
    """As in a server: a request that is cancelled while a step is under way is in no later step's outputs."""
    drafter = {} if plan is None else {"drafter_seed": 1, "plan": plan}
    _, captured = engines(tmp_path, max_num_seqs=3, max_model_len=64, vocab_size=VOCABULARY, **drafter)
    load = Load(captured, check_every=10**9)
    load.run(16 if plan is TREE else 25)
    assert load.cancelled_running > 0
