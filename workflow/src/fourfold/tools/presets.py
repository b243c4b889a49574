"""How models write a call of the Python tool, and how its output is shown to them.

Source of the tags: NeMo-Skills, nemo_skills/prompt/code_tags. `chat` is used where a server has no `/tokenize` that
knows the model's own chat template.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fourfold.errors import FourfoldError

_CHATML = "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
_LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{problem}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@dataclass(frozen=True)
class Preset:
    """A family's protocol."""

    code_begin: str
    code_end: str
    output_begin: str
    output_end: str
    chat: str
    """A conversation in which `{problem}` is asked, up to where the answer begins."""
    labelled: bool = False
    """Whether the output names its status and streams, as Llama 3 knows it."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a request for a completion."""

    def find_code(self, text: str) -> str | None:
        """The code of a call that `text` ends with, whose closing tag stopped it; None if it ends with no call.

        Servers differ in whether the text holds the stop string; both will do.
        """
        _, begin, code = text.removesuffix(self.code_end).rpartition(self.code_begin)
        return code if begin and self.code_end not in code else None

    def show(self, status: str, stdout: str, stderr: str) -> str:
        """The output block's text between its tags; all arguments are plain text already."""
        if not self.labelled:
            text = stdout + stderr
            return text if not text or text.endswith("\n") else text + "\n"
        streams = (f"[{name}]\n{text}[/{name}]" for name, text in (("stdout", stdout), ("stderr", stderr)) if text)
        return "\n".join([status, *streams])


PRESETS = {
    "openmath": Preset("<tool_call>", "</tool_call>", "\n```output\n", "```\n", _CHATML),
    "qwen": Preset("```python\n", "```\n", "```output\n", "```\n", _CHATML),
    "llama3": Preset(
        "<|python_tag|>",
        "<|eom_id|>",
        "<|start_header_id|>ipython<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        _LLAMA3,
        labelled=True,
        # Its tags are special tokens, which servers else leave out of the text.
        body={"skip_special_tokens": False},
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by its name. Raises FourfoldError when there is none of that name."""
    if name not in PRESETS:
        raise FourfoldError(f"tools preset {name!r} is not known; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
