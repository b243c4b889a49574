"""How long running requests wait while a long prompt is read, whole and in parts; one CSV row for each setting.

python docs/measurements/prefill_latency.py MODEL_DIRECTORY FILE.csv [--prompt 2048] [--most 128 256 512]
"""

import argparse
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fourfold.artifacts.provenance import device_name
from fourfold.benchmark.rows import write_csv
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.model.tokenizer import load_tokenizer
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.transformer import Transformer

RUNNING = 7
CONTEXT = 100
ROUNDS = 3
"""Every setting is measured so often, by turns; the medians count."""


def measure(engine: LLMEngine, prompt: list[int]) -> dict[str, float]:
    """Seconds: between a running request's tokens before, and at most while the prompt is read; to its first token."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = engine.target.config.vocab_size
    for tokens in torch.randint(0, vocab_size, (RUNNING, CONTEXT), generator=generator).tolist():
        engine.add_request(tokens, SamplingParams(max_tokens=300, ignore_eos=True))
    watched = engine._waiting[0].output
    while engine.num_waiting:
        engine.step()
    seen, times = len(watched.token_ids), [time.perf_counter()]

    def step() -> None:
        nonlocal seen
        engine.step()
        if len(watched.token_ids) > seen:
            seen = len(watched.token_ids)
            times.append(time.perf_counter())

    for _ in range(12):
        step()
    calm = median([later - earlier for earlier, later in pairwise(times[2:])])
    del times[:-1]
    begin = time.perf_counter()
    engine.add_request(prompt, SamplingParams(max_tokens=50, ignore_eos=True))
    long = engine._waiting[-1].output
    while long.first_token_time is None:
        step()
    step()
    step()
    longest = max(later - earlier for earlier, later in pairwise(times))
    engine.cancel_all()
    return {"itl": calm, "longest_itl": longest, "ttft": long.first_token_time - begin}


def make(target: Transformer, tokenizer: Any, prompt: int, most: int | None) -> LLMEngine:
    """An engine with room for the prompt beside the running requests."""
    return LLMEngine(
        target,
        tokenizer,
        end_token_ids=(),
        max_num_seqs=RUNNING + 1,
        max_model_len=prompt + 400,
        max_num_batched_tokens=most,
    )


def main() -> None:
    """Measures every setting by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--most", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    target, tokenizer = load_transformer(asked.model, asked.device), load_tokenizer(asked.model)
    prompt = torch.randint(0, target.config.vocab_size, (asked.prompt,), generator=torch.Generator().manual_seed(1))
    engines = {most: make(target, tokenizer, asked.prompt, most) for most in (None, *asked.most)}
    found: dict[int | None, list[dict[str, float]]] = {most: [] for most in engines}
    for _ in range(ROUNDS):
        for most, engine in engines.items():
            found[most].append(measure(engine, prompt.tolist()))
    rows = []
    for most, runs in found.items():
        row: dict[str, Any] = {"max_num_batched_tokens": most or "whole", "prompt_tokens": asked.prompt}
        row |= {"running": RUNNING} | {f"{key}_ms": round(median(r[key] for r in runs) * 1e3, 2) for key in runs[0]}
        row["longest_itl_whole_over_this"] = round(
            median(w["longest_itl"] for w in found[None]) / median(r["longest_itl"] for r in runs), 2
        )
        row |= {"device": device_name(str(target.device)), "threads": torch.get_num_threads()}
        rows.append(row | {"torch": torch.__version__, "date": datetime.now(UTC).date().isoformat()})
        print(row)
    write_csv(asked.output, rows)


if __name__ == "__main__":
    main()
