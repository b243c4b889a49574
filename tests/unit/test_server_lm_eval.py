"""lm-eval's own client against the server: scores and answers are the engine's."""

from pathlib import Path

import pytest
from tiny_server import MODEL, byte_engine, tiny_server

from fourfold.engine import SamplingParams

pytest.importorskip("lm_eval", reason="lm-eval brings thirty packages: pip install 'lm-eval[api]==0.4.13' to run this")


def test_lm_eval_scores_and_generates(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("Ada has 3", " apples and buys 4 more."), ("Therefore the", " answer is 7."), ("Each box", " holds 5.")]
    with tiny_server(lambda: byte_engine(tmp_path)) as server:
        lm = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=MODEL,
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=512,
            batch_size=2,
        )
        scoring = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        scores = lm.loglikelihood(scoring, disable_tqdm=True)
        asking = [
            Instance("generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 20, "temperature": 0}), i)
            for i, (prompt, _) in enumerate(pairs)
        ]
        texts = lm.generate_until(asking, disable_tqdm=True)
    engine = byte_engine(tmp_path, drafting=False)
    for (context, continuation), (score, greedy), text in zip(pairs, scores, texts, strict=True):
        before, after = (engine.tokenizer.encode(part) for part in (context, continuation))
        params = SamplingParams(max_tokens=20, prompt_logprobs=1, stop=("\n", "<|im_end|>"))
        (output,) = engine.generate([before + after], [params])
        entries = output.prompt_logprobs[len(before) :]
        assert score == pytest.approx(sum(entry.logprob or 0 for entry in entries), abs=1e-3)
        assert greedy == all(entry.top[0][0] == entry.token for entry in entries)
        (answer,) = engine.generate([before], [params])
        assert text == answer.text
