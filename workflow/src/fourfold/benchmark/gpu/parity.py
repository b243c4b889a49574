"""Is what the device computes right? Asked before anything is timed.

The essentials of tests/gpu, which a machine without the tests can run too: a small random model against the CPU, FP8
products against their emulation, batched against single, drafted against plain, captured against launched steps.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fourfold.benchmark.gpu.models import no_tokenizer
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import DraftPlan
from fourfold.errors import FourfoldError
from fourfold.model.carrier import QWEN2_14B, random_drafter, random_weights
from fourfold.modeling.checkpoint import Weights, build_transformer
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import LinearWeights, make_linear
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.progress import logger
from fourfold.quantize.on_device import input_ranges, to_fp8

CPU = torch.device("cpu")
SHAPE = replace(
    QWEN2_14B,
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
SPREAD = 4.0
"""How much larger weights are than `random_weights` makes them: with less, logits lie too close together to compare."""


def check_parity(device: torch.device) -> None:
    """Runs all checks. Raises FourfoldError naming the first that fails."""
    weights = {
        name: value * SPREAD if value.ndim == 2 else value for name, value in random_weights(SHAPE, CPU, 1).items()
    }
    checks: dict[str, Callable[[Weights, torch.device], str]] = {
        "FP8 products equal their emulation": _fp8_products,
        "logits equal the CPU's": _logits,
        "FP8 logits equal their emulation": _fp8_logits,
        "fused prompts and steps equal the plain forward, in bf16 and in FP8": _fused_step,
        "batched, drafted and captured steps choose the same tokens": _tokens,
    }
    for name, check in checks.items():
        if found := check(weights, device):
            raise FourfoldError(
                f"{device}: parity check failed, {found} ({name}); nothing was timed. `pytest tests/gpu` tells more"
            )
        logger.info("parity: %s", name)


def _fp8_products(weights: Weights, device: torch.device) -> str:
    weight = weights["layers.0.gate_up.weight"].float()
    scale = weight.abs().max() / 448
    layer = LinearWeights((weight / scale).to(torch.float8_e4m3fn), None, scale, torch.tensor(0.01))
    for rows in (1, 12, 48, 130):
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        expected = make_linear(layer, CPU, torch.float32)(x.float())
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        on_device = LinearWeights(layer.weight.to(device), None, scale.to(device), torch.tensor(0.01, device=device))
        got = make_linear(on_device, device, dtype)(x.to(device, dtype)).float().cpu()
        if error := _error(got, expected, 0.03):
            return f"{rows} rows: {error}"
    return ""


def _logits(weights: Weights, device: torch.device) -> str:
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    expected, got = (_logits_of(weights, tokens, place) for place in (CPU, device))
    return _error(got, expected, 2e-3)


def _fp8_logits(weights: Weights, device: torch.device) -> str:
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 60), generator=torch.Generator().manual_seed(2))
    scaled = to_fp8(weights, input_ranges(build_transformer(SHAPE, dict(weights), CPU, torch.float32), [tokens]))
    expected = _logits_of(scaled, tokens, CPU)
    # bfloat16 beside FP8 rounds what FP8 then rounds again: a value next to a boundary moves by one of its 8 steps.
    got = _logits_of(scaled, tokens, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return _error(got, expected, 0.15)


def _fused_step(weights: Weights, device: torch.device) -> str:
    """Prompts, and one new token and four after prompts of different lengths, in the precisions that are timed.

    On a GPU only.
    """
    if device.type != "cuda":
        return ""
    from fourfold.modeling.decode import decode_forward  # Triton is there where a GPU is
    from fourfold.modeling.prefill import prefill_forward

    placed = {name: value.to(device) for name, value in weights.items()}
    plain = build_transformer(SHAPE, dict(placed), device, torch.bfloat16)
    prompt = torch.arange(70, device=device)[None]
    fp8 = build_transformer(SHAPE, to_fp8(placed, input_ranges(plain, [prompt])), device, torch.bfloat16)
    lengths = torch.tensor([5, 70, 64], device=device)
    prompts, whole = torch.arange(210, device=device).view(3, 70), torch.arange(70, device=device).repeat(3, 1)
    for name, target in (("bf16", plain), ("fp8", fp8)):
        caches = [KVCache.allocate(SHAPE, 3, 128, device, torch.bfloat16) for _ in range(2)]
        expected = target.logits(target.forward(prompts, whole, caches[0], 70))
        got = target.logits(prefill_forward(target, prompts, whole, caches[1], 70))
        if error := _error(got.float(), expected.float(), 0.15):
            return f"{name}, prompts: {error}"
        for tokens in (1, 4):
            caches = [KVCache.allocate(SHAPE, 3, 128, device, torch.bfloat16) for _ in range(2)]
            for cache in caches:
                for slot, length in enumerate(lengths.tolist()):
                    places = torch.arange(length, device=device)[None]
                    target.forward(prompt[:, :length], places, cache.slots(slot, slot + 1), length)
            new = torch.arange(3 * tokens, device=device).view(3, tokens) + 17
            positions = lengths[:, None] + torch.arange(tokens, device=device)
            expected = target.logits(target.forward(new, positions, caches[0], 70 + tokens))
            got = target.logits(decode_forward(target, new, positions, caches[1])).view(expected.shape)
            if error := _error(got.float(), expected.float(), 0.15):
                return f"{name}, {tokens} tokens: {error}"
    return ""


def _logits_of(weights: Weights, tokens: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    placed = {name: value.to(device) for name, value in weights.items()}
    target = build_transformer(SHAPE, placed, device, dtype)
    return target.logits(target.hidden_states(tokens.to(device))).float().cpu()


def _error(got: Tensor, expected: Tensor, most: float) -> str:
    """What is wrong, if the difference is more than `most` of the expected values' spread."""
    error = float((got - expected).std() / expected.std())
    return "" if error <= most else f"off by {error:.2g} of the values' spread, where {most:g} is allowed"


def _tokens(weights: Weights, device: torch.device) -> str:
    """In float32, where different orders of summation leave no near ties."""
    placed = {name: value.to(device) for name, value in weights.items()}
    target = build_transformer(SHAPE, placed, device, torch.float32)
    expected = _answers(target, None, 1, eager=True)
    for name, plan, eager in (
        ("batched steps", None, False),
        ("drafts", DraftPlan.fixed(1, 4), False),
        ("launched drafts", DraftPlan.fixed(1, 4), True),
        ("a tree of drafts", DraftPlan.fixed(3, 3, draft_tokens=4), False),
        ("three beams", DraftPlan.fixed(3, 3), True),
    ):
        got = _answers(target, plan, 4, eager=eager)
        different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
        # One near tie may fall the other way where sums have another order.
        if len(different) > (device.type == "cuda"):
            return f"{name} change the tokens of requests {different}"
    return ""


def _answers(target: Transformer, plan: DraftPlan | None, sequences: int, eager: bool) -> list[list[int]]:
    drafter = None if plan is None else _drafter(target)
    engine = LLMEngine(
        target,
        no_tokenizer(),
        end_token_ids=(),
        drafter=drafter,
        plan=plan,
        max_num_seqs=sequences,
        max_model_len=128,
        enforce_eager=eager,
    )
    prompts = [[i + 1, 7, 3] * (i + 1) for i in range(6)]
    params = [SamplingParams(max_tokens=10 + 4 * i, temperature=0.7 * (i % 2), seed=i) for i in range(6)]
    return [output.token_ids for output in engine.generate(prompts, params)]


def _drafter(target: Transformer) -> Redrafter:
    """At random: right now and then in a vocabulary of 512 tokens."""
    drafter = Redrafter(random_drafter(SHAPE, SHAPE.vocab_size), torch.arange(SHAPE.vocab_size))
    generator = torch.Generator().manual_seed(3)
    for parameter in drafter.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return drafter.to(target.device, target.dtype).requires_grad_(False)
