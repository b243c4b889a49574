"""Tool calling: how a model writes code, and what running it may take."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section


class ToolSettings(Section):
    """Code that the model writes runs in a sandbox; names as in NeMo-Skills."""

    preset: Literal["openmath", "qwen", "llama3"] = "openmath"
    """The tags around code and output: openmath has `<tool_call>`, qwen Markdown, llama3 its special tokens."""
    max_code_executions: Annotated[int, Field(ge=0)] = 8
    """Calls that are run for one answer; one more ends it."""
    code_execution_timeout: Annotated[float, Field(gt=0, le=60)] = 10.0
    """Seconds that one call may run."""
    max_code_output_characters: Annotated[int, Field(ge=0)] = 1000
    """Longest output of a call; what is beyond it becomes `<output cut>`."""
