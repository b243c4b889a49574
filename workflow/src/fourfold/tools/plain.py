"""Text that means nothing but itself: what code printed goes back to the model, and must not act on anything.

Tokenizers turn certain strings into special tokens wherever they stand, so a cell that prints `<|im_end|>` could end
its turn and speak as the user. Such strings have one of a few shapes in all model families. Where a prompt is sent as
token ids, `pieces` parts the text inside of each, and no piece holds a whole one: the model sees exactly the text that
was printed, spelled in ordinary tokens. Where a prompt is sent as text, `broken` puts an invisible character there.
"""

import re
from collections.abc import Sequence

ZERO_WIDTH_SPACE = "\u200b"
# <|im_end|>, </tool_call>, <s>, <｜end▁of▁sentence｜>, [INST], [/TOOL_CALLS], [gMASK], [@BOS@]: the place after the
# first character of anything that could be one.
_MARK = re.compile(r"<(?=[^<>\s][^<>\n]{0,200}>)|\[(?=/?[a-z]?[A-Z_@]{2,}\])")
_FENCE = re.compile(r"`(?=``)")
# Control characters could draw over a terminal; the three spaces among them are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with U+FFFD for control characters and halves of characters; newlines and tabs stay."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def quoted(text: str) -> str:
    """A cell's output as it may stand in an output block: printable, and with no fence that could end the block."""
    return _FENCE.sub("`" + ZERO_WIDTH_SPACE, printable(text))


def pieces(text: str, whole: Sequence[str] = ()) -> list[str]:
    """The text in parts of which none holds a string that a tokenizer could take for a special token.

    Args:
        text: anything.
        whole: strings that stay whole: tags that the model itself wrote.
    """
    kept = {at for tag in whole if tag for at in _starts(text, tag)}
    cuts = [match.end() for match in _MARK.finditer(text) if match.start() not in kept]
    return [part for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if (part := text[start:end])]


def broken(text: str, whole: Sequence[str] = ()) -> str:
    """The same as one text, with an invisible character where it would be parted."""
    return ZERO_WIDTH_SPACE.join(pieces(text, whole))


def _starts(text: str, tag: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(tag), text)]
