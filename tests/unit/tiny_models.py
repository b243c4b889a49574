"""Tiny random checkpoints, written by transformers itself: the reference that our model is held to."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fourfold.engine import LLMEngine, RequestOutput
from fourfold.engine.draft_plan import DraftPlan
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig
from fourfold.modeling.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_reference(architecture: str = "llama", seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random transformers model with large enough weights that its greedy text varies."""
    torch.manual_seed(seed)
    values = {**SHAPE, "initializer_range": 0.15, **changes}
    if architecture == "llama":
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**values))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    # Rounded to what is stored; buffers (RoPE's frequencies) are not stored and stay as they are.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.eval()


def save_reference(model: Any, path: Path) -> Path:
    """Writes it as a bf16 checkpoint, as real ones are."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
    return path


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """One word a token, so that text shows the tokens: 'w7 w12'; token 0 ends a text."""
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def tiny_drafter(target: Transformer, seed: int, draft_vocab: list[int] | None = None) -> Redrafter:
    """A random ReDrafter for a tiny model. Half of its head is the target's own: a draft is then right now and then."""
    torch.manual_seed(seed)
    size = None if draft_vocab is None else len(draft_vocab)
    config = RedrafterConfig(target.config.vocab_size, 64, 128, draft_vocab_size=size)
    drafter = Redrafter(config, None if draft_vocab is None else torch.tensor(draft_vocab)).requires_grad_(False)
    with torch.no_grad():
        rows = slice(None) if draft_vocab is None else torch.tensor(draft_vocab)
        drafter.lm_head[-1].weight[:, :64] = target.embedding.float().cpu()[rows]
        drafter.lm_head[-1].weight[:, 64:] *= 4
    return drafter.to(target.device, target.dtype)


def tiny_engine(path: Path, architecture: str = "llama", drafter_seed: int | None = None, **options: Any) -> LLMEngine:
    """An engine over a tiny random model; with `drafter_seed`, one that drafts with a random ReDrafter."""
    shape, device, dtype = options.pop("shape", {}), options.pop("device", "cpu"), options.pop("dtype", None)
    target = load_transformer(save_reference(tiny_reference(architecture, **shape), path), device, dtype)
    vocab_size = target.config.vocab_size
    width, length = options.pop("beam_width", 1), options.pop("beam_length", 4)
    options.setdefault("plan", DraftPlan.fixed(width, length))
    draft_vocab = options.pop("draft_vocab", None)
    drafter = None if drafter_seed is None else tiny_drafter(target, drafter_seed, draft_vocab)
    defaults: dict[str, Any] = {"end_token_ids": (0,), "max_num_seqs": 8, "max_model_len": 128}
    return LLMEngine(target, tiny_tokenizer(vocab_size), drafter=drafter, **{**defaults, **options})


def small_engine(
    checkpoint: Path, vocab_size: int, plan: DraftPlan | None, *, fp8_lm_head: bool = False, **options: Any
) -> LLMEngine:
    """An engine over a checkpoint of few tokens, so that a random ReDrafter is often right; no plan, no drafter."""
    target = load_transformer(checkpoint, "cpu", fp8_lm_head=fp8_lm_head)
    drafter = None if plan is None else tiny_drafter(target, seed=1)
    return LLMEngine(target, tiny_tokenizer(vocab_size), end_token_ids=(0,), drafter=drafter, plan=plan, **options)


def run_all(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps until all requests have ended; their outputs by id."""
    outputs = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs
