"""Reading prompts: in parts between decoding steps, with the same tokens, and in memory that does not square."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_engine, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.modeling.transformer import Transformer


def engine_like(engine: LLMEngine, **options: Any) -> LLMEngine:
    """Another engine over the same model."""
    options = {"max_num_seqs": 4, "max_model_len": 400, **options}
    drafter = options.pop("drafter", None)
    return LLMEngine(engine.target, tiny_tokenizer(), end_token_ids=(0,), drafter=drafter, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"), drafter_seed=3)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Short and long prompts by turns, greedy and sampled."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 300, 17, 40, 5, 333, 90, 16, 250]
    prompts = [torch.randint(1, 320, (n,), generator=generator).tolist() for n in lengths]
    params = [
        SamplingParams(max_tokens=8 + 5 * (i % 4), temperature=0.8 * (i % 2), seed=i, ignore_eos=True)
        for i in range(len(lengths))
    ]
    return prompts, params


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": True}], ids=["plain", "prefixes"])
@pytest.mark.parametrize("plan", [None, DraftPlan.fixed(1, 4), DraftPlan.fixed(3, 3)], ids=["none", "one", "beams"])
@pytest.mark.parametrize("most", [16, 100])
def test_tokens_are_the_same_however_prompts_are_cut(
    base: LLMEngine, plan: DraftPlan | None, options: dict[str, Any], most: int
) -> None:
    prompts, params = requests()
    expected = engine_like(base).generate(prompts, params)
    drafter = {} if plan is None else {"drafter": base.drafter, "plan": plan}
    engine = engine_like(base, max_num_batched_tokens=most, **drafter, **options)
    for _ in range(2):
        got = engine.generate(prompts, params)
        assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    assert got[1].num_cached_tokens == 0 or options


def test_hidden_states_have_the_same_bits_however_a_prompt_is_cut(base: LLMEngine) -> None:
    prompt = requests()[0][5]
    (whole, *others) = (
        engine_like(base, max_num_batched_tokens=most, max_num_seqs=2) for most in (None, 16, 17, 100, 150)
    )
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for engine in (whole, *others):
        engine.add_request(prompt, params)
        while engine.num_waiting:
            engine.step()
    for engine in others:
        assert torch.equal(engine._hidden[0], whole._hidden[0])
        assert torch.equal(engine._cache.data[:, 0, :, : len(prompt)], whole._cache.data[:, 0, :, : len(prompt)]), (
            "other keys and values"
        )


def test_running_requests_decode_between_the_parts(base: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While 300 tokens are read, 32 a step, three requests get a token every second step at least."""
    engine = engine_like(base, max_num_batched_tokens=32)
    read: list[int] = []
    forward = Transformer.forward

    def watched(self: Transformer, token_ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if token_ids.shape[1] > 1:
            read.append(token_ids.numel())
        return forward(self, token_ids, *arguments)

    for i in range(3):
        engine.add_request([5 + i], SamplingParams(max_tokens=100, ignore_eos=True))
    running = {output.request_id: output for output in engine.step()}
    monkeypatch.setattr(Transformer, "forward", watched)
    long = engine.add_request(requests()[0][1], SamplingParams(max_tokens=2, ignore_eos=True))
    lengths: list[int] = []
    found: list[RequestOutput] = []
    while not any(output.request_id == long for output in found):
        assert engine.num_waiting == 1
        found = engine.step()
        lengths.append(min(len(output.token_ids) for output in running.values()))
    assert read == [32] * 9 + [12]
    assert lengths[-1] == 1 + len(read)
    assert engine.num_running == 4


def test_several_short_prompts_are_read_in_one_step(base: LLMEngine) -> None:
    engine = engine_like(base, max_num_batched_tokens=32)
    for token in (7, 8, 9, 10):
        engine.add_request([token] * 10, SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(engine.step()) == 3
    assert (engine.num_running, engine.num_waiting) == (3, 1)
    engine.cancel_all()


def test_a_prompt_is_cancelled_while_it_is_read(base: LLMEngine) -> None:
    engine = engine_like(base, max_num_batched_tokens=16)
    prompts, params = requests()
    (alone,) = engine.generate(prompts[:1], params[:1])
    name = engine.add_request(prompts[1], params[1])
    assert engine.step() == []
    assert engine.has_unfinished
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    assert engine.cancel(name)
    assert not engine.cancel(name)
    assert not engine.has_unfinished
    assert engine.generate(prompts[:1], params[:1])[0].token_ids == alone.token_ids
    engine.add_request(prompts[1], params[1], name)
    engine.step()
    engine.cancel_all()
    assert not engine.has_unfinished


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result of any operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_a_context_of_32k_takes_no_square_of_it(tmp_path: Path) -> None:
    length = 32768
    shape = {"max_position_embeddings": length, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    engine = tiny_engine(tmp_path, shape=shape, max_num_seqs=1, max_model_len=length, max_num_batched_tokens=4096)
    prompt = torch.randint(1, 320, (length - 4,), generator=torch.Generator().manual_seed(0)).tolist()
    # The cache, and the mask of one part of the prompt for both query heads.
    most = max(engine._cache.data.numel(), 2 * 512 * length)
    with Largest() as largest:
        (output,) = engine.generate([prompt], [SamplingParams(max_tokens=4, ignore_eos=True)])
    assert len(output.token_ids) == 4
    assert largest.elements <= most < length**2 / 16
