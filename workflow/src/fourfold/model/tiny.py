"""Makes a small model with random weights and a small real tokenizer, so that the whole workflow can run anywhere."""

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils.logging import disable_progress_bar

from fourfold.config.model import TinyModel
from fourfold.errors import FourfoldError

VOCAB_SIZE = 512
MAX_POSITIONS = 2048
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Emma", "Farid")
_THINGS = ("apples", "books", "coins", "eggs", "pencils", "tickets")
_SENTENCES = (
    "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
    "{name} starts with {a} {thing}, so the total is {a} + {b} = {c} {thing}.",
    "Each box holds {a} {thing}. First, we multiply the number of boxes by {a}.",
    "Therefore the answer is {c}.\n\n#### {c}",
    "Because each ticket costs ${a}, the whole family pays {b} times as much: ${a} * {b}.",
    "Half of them are given away on Monday, a quarter on Tuesday, and the rest before the weekend.",
    "To find the difference, subtract the smaller number from the larger: {c} - {a} = {b}.",
    "Divide the remaining amount equally among {b} friends; every person receives the same share.",
    "What percentage of the {thing} did {name} sell during the first week of the month?",
)


def make_tiny(settings: TinyModel, directory: Path) -> None:
    """Writes a checkpoint in bfloat16 with tokenizer and chat template; the same settings give the same bytes.

    Raises FourfoldError when the shape is impossible.
    """
    config = tiny_config(settings)
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            # Layers that outweigh the embedding in the residual stream: else a tied head would only repeat its input.
            std = 0.05 if "embed_tokens" in name else 3 / parameter.shape[-1] ** 0.5
            parameter.normal_(0.0, std, generator=generator)
    disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)


def tiny_config(settings: TinyModel) -> PretrainedConfig:
    """The configuration of a tiny Llama (tied embeddings) or Qwen2 (an output layer of its own)."""
    heads, kv_heads = settings.num_attention_heads, settings.num_key_value_heads
    if heads % kv_heads or settings.hidden_size % (2 * heads):
        raise FourfoldError(
            f"model: {heads} heads of a model of width {settings.hidden_size} with {kv_heads} key/value heads; "
            "the key/value heads must divide the heads, and twice the heads the width"
        )
    llama = settings.architecture == "llama"
    kind = LlamaConfig if llama else Qwen2Config
    return kind(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=llama,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with VOCAB_SIZE tokens, trained on a few hundred sentences about sums; digits stay single."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        model_max_length=MAX_POSITIONS,
    )


def _sentences() -> list[str]:
    choices = itertools.product(_SENTENCES, _NAMES, _THINGS)
    return [
        sentence.format(name=name, thing=thing, a=7 * i % 90 + 2, b=i % 40 + 1, c=7 * i % 90 + i % 40 + 3)
        for i, (sentence, name, thing) in enumerate(choices)
    ]
