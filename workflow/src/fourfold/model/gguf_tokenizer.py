"""Builds the tokenizer that a GGUF file describes: byte-level BPE with the file's own tokens and merges.

A GGUF file names its way of splitting text (`tokenizer.ggml.pre`) without spelling it out. transformers' conversion
ignores that name and splits every model's text as GPT-2 did; SmolLM2, for one, splits digits from what is before
them, so that "\\n\\n1" is the two tokens "\\n\\n", "1" that it was trained on and not the three "\\n", "\\n", "1".
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fourfold.errors import FourfoldError

# Kinds of token in `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(number: str) -> PreTokenizer:
    words = Split(Regex(_WORDS % number), behavior="isolated")
    return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(*, digits: bool) -> PreTokenizer:
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    return Sequence([Digits(individual_digits=True), gpt2]) if digits else gpt2


def _pre_tokenizer(name: str) -> PreTokenizer:
    if name == "smollm":
        return _gpt2(digits=True)
    if name in ("gpt-2", "default"):
        return _gpt2(digits=False)
    if name in ("qwen2", "deepseek-r1-qwen"):
        return _split(r"\p{N}")
    if name == "llama-bpe":
        return _split(r"\p{N}{1,3}")
    raise FourfoldError(f"tokenizer.ggml.pre is {name!r}; known are smollm, gpt-2, qwen2, deepseek-r1-qwen, llama-bpe")


def gguf_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template, from a GGUF file's metadata.

    Raises FourfoldError when it is not byte-level BPE or splits text in a way that is not known here.
    """

    def entry(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if entry("model") != "gpt2":
        raise FourfoldError(f"tokenizer.ggml.model is {entry('model')!r}: only byte-level BPE ('gpt2') can be read")
    tokens: list[str] = entry("tokens")
    pre = entry("pre", "default")
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in entry("merges"))],
            # Llama 3's vocabulary holds whole words that no chain of merges reaches.
            ignore_merges=pre == "llama-bpe",
        )
    )
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = ByteLevelDecoder()
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = NFC()
    kinds = entry("token_type", [])
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {
        name: tokens[entry(key)]
        for name, key in {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }.items()
        if entry(key) is not None
    }
    if entry("add_bos_token", False):
        bos = special["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, entry("bos_token_id"))]
        )
    special.setdefault("pad_token", special["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        **special,
    )
