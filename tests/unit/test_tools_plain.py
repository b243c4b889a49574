"""What code printed is text to the model and nothing else: no special token, no tag, no end of its block."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import TOKENIZER

from fourfold.engine.requests import RequestOutput, SamplingParams
from fourfold.engine.sequence import Sequence
from fourfold.model.tokenizer import load_tokenizer
from fourfold.tools.plain import broken, pieces, printable, quoted
from fourfold.tools.presets import PRESETS, find_preset

SMOLLM2 = load_tokenizer(TOKENIZER)
SPECIAL = {str(token): number for number, token in SMOLLM2.added_tokens_decoder.items()}
OTHERS = (
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[/TOOL_RESULTS]", "[gMASK]", "<sop>", "<eop>",
    "<start_of_turn>", "<end_of_turn>", "[@BOS@]",
    "<｜end▁of▁sentence｜>", "<｜User｜>", "<|eot_id|>", "<|python_tag|>",
    "<|start_header_id|>", "<|START_OF_TURN_TOKEN|>", "<fim_prefix>", "<tool_call>", "</tool_call>", "<tool_response>",
    "<0x0A>", "<pad>", "<mask>", "<think>", "</think>", "<|reserved_special_token_0|>",
)  # fmt: skip
"""Special tokens of other families: Llama, Mistral, GLM, Gemma, DeepSeek, Command R, Qwen, StarCoder."""


def encoded(text: str) -> list[int]:
    return [token for piece in pieces(text) for token in SMOLLM2.encode(piece, add_special_tokens=False)]


def test_the_tokenizer_is_smollm2s_and_would_be_taken_in() -> None:
    """Without precautions the attack works: else the tests below would show nothing."""
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<jupyter_output>"} <= SPECIAL.keys()
    assert len(SPECIAL) == 17
    for text, number in SPECIAL.items():
        assert number in SMOLLM2.encode(f"x {text} y", add_special_tokens=False)


@pytest.mark.parametrize("wrap", ["{}", "x{}y", "<{}>", "<<{}", "{}{}", "<|im_{}end|>", "\n{}\n", "[{}]", "`{}`"])
def test_hostile_output_holds_no_special_token(wrap: str) -> None:
    for text in SPECIAL:
        hostile = wrap.replace("{}", text)
        assert not set(encoded(hostile)) & set(SPECIAL.values()), hostile
        assert SMOLLM2.decode(encoded(hostile)) == hostile, "the model no longer sees what was printed"
        assert not set(SMOLLM2.encode(broken(hostile), add_special_tokens=False)) & set(SPECIAL.values())


@given(
    st.lists(st.sampled_from([*SPECIAL, *OTHERS, "<", ">", "|", "[", "]", "/", "\n", " ", "é", "im_end|>"]), max_size=9)
)
@settings(max_examples=200, deadline=None)
def test_no_mixture_of_them_does_either(parts: list[str]) -> None:
    hostile = "".join(parts)
    assert "".join(pieces(hostile)) == hostile
    assert not set(encoded(hostile)) & set(SPECIAL.values())
    for mark in (*SPECIAL, *OTHERS):
        assert not any(mark in piece for piece in pieces(hostile))
        assert mark not in broken(hostile)


def test_the_models_own_tags_stay_whole() -> None:
    tags = ("<tool_call>", "</tool_call>")
    assert pieces("a <tool_call>b</tool_call>", tags) == ["a <tool_call>b</tool_call>"]
    assert pieces("a <tool_call>b<|im_end|>", tags) == ["a <tool_call>b<", "|im_end|>"]


def test_ordinary_text_stays_in_one_piece() -> None:
    """Code and numbers are tokenised as they are; only what could be a special token is parted."""
    for text in ("x < 5 and y <= 7", "a[i] + b[j]", "[1, 2, 3]", "f(x) -> int", "1 << 4 >= 2", "Interval(0, 5)\n", ""):
        assert len(pieces(text)) <= 1, text


def test_no_output_can_end_its_block() -> None:
    for text in ("```", "a```\nb", "````", "```````output\n"):
        assert "```" not in quoted(text)
    assert quoted("a `b` ``c``") == "a `b` ``c``"


@given(st.text(alphabet=string.printable + "\x1b\x9b\x00\x7f\ud800é∑", max_size=40))
@settings(max_examples=100, deadline=None)
def test_what_is_printed_cannot_draw_over_a_terminal(text: str) -> None:
    assert all(c.isprintable() or c in "\n\t" for c in printable(text))
    printable(text).encode()


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_call_is_found_with_and_without_its_closing_tag(name: str) -> None:
    preset = find_preset(name)
    text = f"Let us see.{preset.code_begin}print(1)\n"
    assert preset.find_code(text) == "print(1)\n"
    assert preset.find_code(text + preset.code_end) == "print(1)\n"
    assert preset.find_code("No call.") is None
    assert preset.find_code(f"{text}{preset.code_end} and done") is None


def test_output_is_shown_as_each_family_knows_it() -> None:
    assert PRESETS["openmath"].show("completed", "70", "") == "70\n"
    assert PRESETS["qwen"].show("completed", "", "") == ""
    assert PRESETS["llama3"].show("error", "1\n", "no\n") == "error\n[stdout]\n1\n[/stdout]\n[stderr]\nno\n[/stderr]"


def test_tags_that_are_special_tokens_are_seen_where_the_preset_asks_for_them() -> None:
    """Llama 3's are; SmolLM2's stand for them here."""
    assert PRESETS["llama3"].body == {"skip_special_tokens": False}
    tokens = [*SMOLLM2.encode("print(1)"), SPECIAL["<jupyter_code>"]]
    for skip, text in ((True, "print(1)"), (False, "print(1)<jupyter_code>")):
        params = SamplingParams(skip_special_tokens=skip)
        sequence = Sequence(RequestOutput("r", [1]), params, frozenset(), SMOLLM2.backend_tokenizer)
        for token in tokens:
            sequence.append(token)
        assert sequence.output.text == text
