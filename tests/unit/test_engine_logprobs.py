"""How likely tokens are: what transformers computes, whatever drafts, chunks and stops do; nothing unless asked."""

import pytest
import torch
from test_engine import prompts
from tiny_models import tiny_engine, tiny_reference

from fourfold.engine import LLMEngine, SamplingParams, prefill, tell


@pytest.fixture(scope="module", params=[None, 0], ids=["plain", "drafting"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"), drafter_seed=request.param)


def expected(tokens: list[int]) -> torch.Tensor:
    """Logarithms of the probabilities before each token but the first, by transformers: [tokens - 1, vocab]."""
    return tiny_reference()(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1).detach()


def test_probabilities_equal_transformers(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled requests in one batch, beside one that asks for nothing; the prompt in several chunks."""
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(tell, "ROWS", 5)
    asked = prompts(4, seed=3)
    params = [
        SamplingParams(max_tokens=20, temperature=t, seed=1, ignore_eos=True, logprobs=top, prompt_logprobs=top)
        for t, top in ((0.0, 3), (1.0, 0), (0.7, 2), (0.0, None))
    ]
    *told, silent = engine.generate(asked, params)
    for output, p in zip(told, params, strict=False):
        prompt = output.prompt_token_ids
        reference = expected(prompt + output.token_ids)
        first, *entries = output.prompt_logprobs + output.logprobs
        assert (first.token, first.logprob, first.top) == (prompt[0], None, ())
        assert [entry.token for entry in entries] == (prompt + output.token_ids)[1:]
        own = torch.tensor([entry.logprob for entry in entries])
        torch.testing.assert_close(
            own, reference.gather(1, torch.tensor([[e.token] for e in entries]))[:, 0], atol=1e-3, rtol=0
        )
        assert {len(entry.top) for entry in entries} == {p.logprobs}
        if p.logprobs:
            best = torch.tensor([[logprob for _, logprob in entry.top] for entry in entries])
            torch.testing.assert_close(best, reference.topk(p.logprobs).values, atol=1e-3, rtol=0)
        if p.temperature == 0:
            assert all(entry.top[0][0] == entry.token for entry in output.logprobs)
    assert silent.logprobs == silent.prompt_logprobs == []


def test_a_request_that_ends_early_has_no_more_of_them_than_tokens(engine: LLMEngine) -> None:
    (prompt,) = prompts(1, seed=5)
    (free,) = engine.generate([prompt], [SamplingParams(max_tokens=30, ignore_eos=True)])
    for end in range(1, 12):
        stop = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(free.token_ids[end],), logprobs=1)
        (output,) = engine.generate([prompt], [stop])
        assert [entry.token for entry in output.logprobs] == output.token_ids


def test_nothing_is_computed_unless_asked(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tell, "token_logprobs", None)
    engine.generate(prompts(3), [SamplingParams(max_tokens=10)] * 3)
