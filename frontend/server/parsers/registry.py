"""Name → parser, and which one a model needs."""

from collections.abc import Mapping
from typing import TypeVar

from folovllm.common.errors import ConfigError
from folovllm.frontend.server.parsers.base import ReasoningFormat, ToolFormat
from folovllm.frontend.server.parsers.hermes import HERMES
from folovllm.frontend.server.parsers.llama3_json import LLAMA3_JSON
from folovllm.frontend.server.parsers.think import THINK

TOOL_FORMATS: Mapping[str, ToolFormat] = {"hermes": HERMES, "llama3_json": LLAMA3_JSON}
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {"think": THINK}

# What stands in the chat template of models that write a format: (text, name of the format), first match counts.
TOOL_MARKS: tuple[tuple[str, str], ...] = (
    ("<function=", "none"),  # Qwen3-Coder: the same tags around XML, which is no format of ours
    ("<tool_call>", "hermes"),
    ("dictionary of argument name and its value", "llama3_json"),
)
REASONING_MARKS: tuple[tuple[str, str], ...] = (("</think>", "think"),)

Format = TypeVar("Format", ToolFormat, ReasoningFormat)


def choose_tool_format(name: str, chat_template: str | None) -> ToolFormat | None:
    """The format called `name`; "auto" looks into the chat template, "none" is none. Raises ConfigError."""
    return _choose("tool_parser", name, TOOL_FORMATS, TOOL_MARKS, chat_template)


def choose_reasoning_format(name: str, chat_template: str | None) -> ReasoningFormat | None:
    """The format called `name`; "auto" looks into the chat template, "none" is none. Raises ConfigError."""
    return _choose("reasoning_parser", name, REASONING_FORMATS, REASONING_MARKS, chat_template)


def _choose(
    option: str,
    name: str,
    formats: Mapping[str, Format],
    marks: tuple[tuple[str, str], ...],
    chat_template: str | None,
) -> Format | None:
    if name == "auto":
        name = next((found for mark, found in marks if mark in (chat_template or "")), "none")
    if name == "none":
        return None
    if name not in formats:
        raise ConfigError(f"{option}={name!r} is not known; choose one of {', '.join(['auto', 'none', *formats])}")
    return formats[name]
