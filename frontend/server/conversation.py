"""Messages and tools of a body → what the chat template takes."""

from collections.abc import Sequence
from typing import Any

import msgspec

from folovllm.common.errors import RequestError
from folovllm.frontend.server.protocol.chat import ChatMessage
from folovllm.frontend.server.protocol.tools import Tool

_ONLY_EMPTY = ("refusal", "annotations", "audio", "function_call")
_PASSED_ON = ("name", "tool_calls", "tool_call_id")


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Plain messages; fields that are null are left out, but for the content.

    Raises:
        RequestError: a message holds what no text model can be given.
    """
    return [_to_message(i, message) for i, message in enumerate(messages)]


def _to_message(index: int, message: ChatMessage) -> dict[str, Any]:
    for name in _ONLY_EMPTY:
        if getattr(message, name):
            raise RequestError(f"messages[{index}].{name} is not supported", f"messages[{index}].{name}")
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in _PASSED_ON:
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    return plain


def to_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form as plain objects; None for none."""
    if not tools:
        return None
    plain: list[dict[str, Any]] = msgspec.to_builtins(list(tools))
    return plain
