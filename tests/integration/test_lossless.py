"""Drafts change no token, on every kind of engine row: 240 requests of all kinds, more than run at once.

Prompts and answers are ragged and cross the numbers of keys at which a CPU's attention changes its sums; answers end at
stop strings, at end-of-text and at max_tokens, on the borders of drafts and inside them; half are sampled. The plan
changes with the number of running requests: wide trees for one, single beams for some, no drafts for many.
"""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import save_reference, small_engine, tiny_reference, tiny_tokenizer

from fourfold.config.quantize import QuantizeSettings
from fourfold.engine import LLMEngine, RequestOutput, SamplingParams
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.quantize.fp8 import quantize_fp8
from fourfold.quantize.int8 import quantize_int8

REQUESTS = 240
VOCABULARY = 8
MAX_MODEL_LEN = 440
PLANS = {
    "one beam": DraftPlan.fixed(1, 4),
    "three beams": DraftPlan.fixed(3, 4),
    "likely drafts": DraftPlan.fixed(3, 4, 0.1),
    "by load": DraftPlan({1: DraftShape(4, 4, 0.05), 3: DraftShape(2, 3), 6: DraftShape(1, 4, 0.1), 8: NO_DRAFTS}),
}
NUMERICS = ("bf16", "fp8", "int8_wo", "fp8-kv_cache-lm_head")
Answers = dict[str, list[RequestOutput]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with few tokens, so that drafts are often right, in three precisions."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_reference(tiny_reference(vocab_size=VOCABULARY, max_position_embeddings=512), folder / "bf16")
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder / "bf16")
    for precision in ("fp8", "int8_wo"):
        (folder / precision).mkdir()
    texts = [" ".join(f"w{1 + (a * b) % 7}" for b in range(1, 40)) for a in range(1, 9)]
    quantize_fp8(folder / "bf16", texts, QuantizeSettings(max_length=64), folder / "fp8", torch.device("cpu"))
    quantize_int8(folder / "bf16", folder / "int8_wo")
    return folder


def make_engine(checkpoints: Path, numerics: str, plan: DraftPlan | None, max_num_seqs: int = 9) -> LLMEngine:
    precision, *also = numerics.split("-")
    return small_engine(
        checkpoints / precision,
        VOCABULARY,
        plan,
        fp8_lm_head="lm_head" in also,
        kv_cache_dtype=torch.float8_e4m3fn if "kv_cache" in also else None,
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
    )


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + i * 53 % (MAX_MODEL_LEN - 64) for i in range(REQUESTS)]
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    params = [
        SamplingParams(
            max_tokens=1 + i * 7 % 60,
            temperature=(0.0, 0.0, 0.5, 1.0)[i % 4],
            top_k=(0, 4)[i // 4 % 2],
            top_p=(1.0, 0.9)[i // 8 % 2],
            min_p=(0.0, 0.02)[i // 16 % 2],
            seed=i,
            stop=((), ("w5w", "3w1"), ("w2w6",))[i // 3 % 3],
            ignore_eos=i % 3 > 0,
        )
        for i in range(REQUESTS)
    ]
    return prompts, params


@pytest.fixture(scope="module")
def plain(checkpoints: Path) -> Answers:
    """The answers without drafts, one request at a time: nothing of a batch can be in them."""
    return {
        numerics: make_engine(checkpoints, numerics, None, max_num_seqs=1).generate(*requests())
        for numerics in NUMERICS
    }


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("plan", [None, *PLANS])
def test_tokens_are_those_of_plain_decoding_alone(
    checkpoints: Path, plain: Answers, numerics: str, plan: str | None
) -> None:
    engine = make_engine(checkpoints, numerics, None if plan is None else PLANS[plan])
    got = engine.generate(*requests())
    for i, (a, b) in enumerate(zip(plain[numerics], got, strict=True)):
        assert b.token_ids == a.token_ids, f"request {i}"
        assert (b.text, b.finish_reason) == (a.text, a.finish_reason), f"request {i}"
    if plan is not None:
        accepted = sum(output.speculation.num_accepted_tokens for output in got)
        assert accepted > 0.05 * sum(output.speculation.num_drafts for output in got) > 0, "hardly a draft was right"


def test_what_is_rounded_changes_tokens(plain: Answers) -> None:
    texts = {numerics: [output.token_ids for output in outputs] for numerics, outputs in plain.items()}
    for one, other in itertools.combinations(NUMERICS, 2):
        assert texts[one] != texts[other], f"{one} rounds like {other}"


def test_the_requests_end_in_all_ways_and_cross_all_borders(plain: Answers) -> None:
    """What the requests above cover: without it, equality would show little."""
    outputs = plain["bf16"]
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert sum(output.token_ids[-1] == 0 for output in outputs) > 5
    assert sum(output.finish_reason == "stop" and output.token_ids[-1] != 0 for output in outputs) > 5
    for border in (64, 128, 192, 256, 320, 384):
        crossing = [
            output
            for output in outputs
            if len(output.prompt_token_ids) < border < len(output.prompt_token_ids) + len(output.token_ids)
        ]
        assert len(crossing) > 5, border
