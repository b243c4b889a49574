"""Captured prompts against launched ones: on a GPU, or as plain calls through Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_reference, tiny_engine, tiny_reference
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.prompt_graphs import PromptGraphs
from fourfold.modeling.captures import Captures
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.kv_cache import KVCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 64 if DEVICE.type == "cuda" else 16
"""To a multiple of which numbers of tokens are rounded up."""


@pytest.fixture(autouse=True)
def blocks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine.prompt_graphs", "modeling.prefill"):
        monkeypatch.setattr(f"fourfold.{module}.padded_length", lambda length, *_: -(-length // BLOCK) * BLOCK)


class Uncaptured(PromptGraphs):
    """Computes where a graph would be replayed; its states are in the same place each time, as a graph's are."""

    def _capture(self, tokens: Tensor) -> tuple[Callable[[], None], Tensor]:
        place = self.body(tokens)
        return lambda: place.copy_(self.body(tokens)), place


KIND = PromptGraphs if DEVICE.type == "cuda" else Uncaptured


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 319, (length,), generator=generator).tolist() for length in lengths]


def engines(path: Path, longest: int, **options: Any) -> tuple[LLMEngine, LLMEngine]:
    """One that launches each kernel, and one whose prompts are captured."""
    shape = {"num_hidden_layers": 1}
    options = {"device": str(DEVICE), "dtype": torch.float32, "max_model_len": 256, "drafter_seed": 3, **options}
    launched, captured = (tiny_engine(path, shape=shape, **options) for _ in range(2))
    launched.prefill.graphs = None
    captured.prefill.graphs = KIND(captured.target, longest, torch.float32, Captures())
    return launched, captured


def test_a_slot_gets_the_prompt_and_nothing_else(tmp_path: Path) -> None:
    """Whatever an earlier, longer prompt has left; and what the slot holds behind it stays."""
    target = load_transformer(save_reference(tiny_reference(), tmp_path), str(DEVICE), torch.float32)
    graphs, short = KIND(target, 128, torch.float32, Captures()), BLOCK // 2 + 3
    reference, cache = (KVCache.allocate(target.config, 3, 128, DEVICE, torch.float32) for _ in range(2))
    cache.data.fill_(7.0)
    for tokens in random_prompts(BLOCK + 9, BLOCK, short):
        graphs._cache.data.fill_(float("nan"))
        hidden = graphs.read(tokens, cache.slots(2, 3))
        assert hidden.shape == (1, len(tokens), target.config.hidden_size)
    positions = torch.arange(short, device=DEVICE)[None]
    expected = target.forward(torch.tensor([tokens], device=DEVICE), positions, reference.slots(1, 2), short)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.data[:, 2, :, :short], reference.data[:, 1, :, :short], rtol=1e-4, atol=1e-4)
    assert cache.data[:, :2].eq(7).all()
    assert cache.data[:, 2, :, BLOCK + 9 :].eq(7).all()
    assert set(graphs._prompts) == {BLOCK, 2 * BLOCK}


@pytest.mark.parametrize("blocks", [1, 2], ids=["beginnings", "whole prompts"])
def test_tokens_are_those_of_launched_prompts(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, some of them alike, some longer than a captured one, some with their prompts' probabilities."""
    monkeypatch.setattr("fourfold.engine.prefill.PREFILL_CHUNK", blocks * BLOCK)
    launched, captured = engines(tmp_path, blocks * BLOCK, max_num_seqs=3)
    prompts = random_prompts(1, BLOCK, BLOCK // 2, 2 * BLOCK + 7, BLOCK + 1)
    prompts.insert(2, prompts[1])
    params = [
        SamplingParams(
            max_tokens=4, temperature=0.8 * (i % 2), seed=i, ignore_eos=True, prompt_logprobs=None if i % 4 else 2
        )
        for i in range(6)
    ]
    expected, got = launched.generate(prompts, params), captured.generate(prompts, params)
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    for ours, theirs in zip(got, expected, strict=True):
        one, other = ([place.logprob for place in output.prompt_logprobs[1:]] for output in (ours, theirs))
        assert one == pytest.approx(other, abs=1e-3)
    assert captured.prefill.graphs is not None


def test_prompts_in_parts_begin_with_a_captured_one(tmp_path: Path) -> None:
    launched, captured = engines(tmp_path, 2 * BLOCK, max_num_batched_tokens=BLOCK + 6)
    prompts, params = random_prompts(2 * BLOCK + 9, 20), [SamplingParams(max_tokens=4, ignore_eos=True)] * 2
    expected, got = launched.generate(prompts, params), captured.generate(prompts, params)
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    assert 2 * BLOCK in captured.prefill.graphs._prompts


def test_of_short_prompts_all_is_read_whatever_is_known(tmp_path: Path) -> None:
    launched, captured = engines(tmp_path, 2 * BLOCK, enable_prefix_caching=True)
    (prompt,) = random_prompts(BLOCK + 8)
    params, known = [SamplingParams(max_tokens=3, ignore_eos=True)], []
    for length in (BLOCK - 2, BLOCK + 8) * 2:
        expected, got = (engine.generate([prompt[:length]], params)[0] for engine in (launched, captured))
        assert got.token_ids == expected.token_ids
        known.append((expected.num_cached_tokens, got.num_cached_tokens))
    assert known[2:] == [(BLOCK - 3, 0), (BLOCK + 7, BLOCK + 7)]


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 20.00 MiB", "no kernel image"])
def test_without_memory_for_a_graph_prompts_are_launched(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, captured = engines(tmp_path, 2 * BLOCK)

    def refuse(*_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(captured.prefill.graphs, "_capture", refuse)
    (prompt,), params = random_prompts(20), [SamplingParams(max_tokens=4, ignore_eos=True)]
    if "memory" not in text:
        with pytest.raises(RuntimeError, match=text):
            captured.generate([prompt], params)
        return
    expected, got = launched.generate([prompt], params), captured.generate([prompt], params)
    assert got[0].token_ids == expected[0].token_ids
    assert captured.prefill.graphs is None
