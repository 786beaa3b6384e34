"""Anthropic's request → the chat request that every chat-like endpoint comes down to."""

from collections.abc import Mapping, Sequence
from typing import Any

from folovllm.common.errors import RequestError
from folovllm.frontend.server.bodies import FieldCheck
from folovllm.frontend.server.protocol.chat import ChatMessage, ChatRequest
from folovllm.frontend.server.protocol.messages import (
    CountTokensRequest,
    MessageParam,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    Thinking,
)
from folovllm.frontend.server.protocol.tools import FunctionDefinition, NamedFunction, NamedToolChoice, Tool, ToolChoice

_BLOCK_FIELDS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", "citations"}),
    "thinking": frozenset({"thinking", "signature"}),
    "tool_use": frozenset({"id", "name", "input", "caller"}),
    "tool_result": frozenset({"tool_use_id", "content", "is_error"}),
}
_ANYWHERE = frozenset({"type", "cache_control"})
_BLOCKS_OF = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


def to_chat_request(body: MessagesRequest, chat_template: str, fields: FieldCheck) -> ChatRequest:
    """The same request in the other form. Raises RequestError for what has no counterpart.

    Args:
        body: as it came.
        chat_template: source of the model's template; "" for none.
        fields: what is done about unknown fields of its blocks.
    """
    return _with_conversation(
        body,
        chat_template,
        fields,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )


def to_counted_request(body: CountTokensRequest, chat_template: str, fields: FieldCheck) -> ChatRequest:
    """A request whose prompt is the one to be counted."""
    return _with_conversation(body, chat_template, fields)


def _with_conversation(body: CountTokensRequest, chat_template: str, fields: FieldCheck, **more: Any) -> ChatRequest:
    choice = body.tool_choice
    if body.thinking is not None and body.thinking.display not in (None, "summarized"):
        raise RequestError("thoughts are always shown: thinking.display must be null or summarized", "thinking.display")
    return ChatRequest(
        model=body.model,
        messages=_messages(body, fields),
        continue_final_message=bool(body.messages) and body.messages[-1].role == "assistant",
        tools=[_tool(i, tool) for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        thinking_budget=body.thinking.budget_tokens if body.thinking else None,
        chat_template_kwargs=_template_variables(body.thinking, chat_template),
        **more,
    )


def _template_variables(thinking: Thinking | None, chat_template: str) -> dict[str, Any] | None:
    """Qwen3's switch; a model without one thinks, or does not, as it was made."""
    if thinking is None or thinking.type == "adaptive" or "enable_thinking" not in chat_template:
        return None
    return {"enable_thinking": thinking.type == "enabled"}


def _tool(index: int, tool: MessagesTool) -> Tool:
    if tool.type not in (None, "custom"):
        where = f"tools[{index}].type"
        raise RequestError(f"{where}={tool.type[:80]!r} runs at Anthropic's; here are custom tools only", where)
    return Tool(function=FunctionDefinition(name=tool.name, description=tool.description, parameters=tool.input_schema))


def _tool_choice(choice: MessagesToolChoice) -> ToolChoice:
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice of type tool needs the tool's name", "tool_choice.name")
        return NamedToolChoice(function=NamedFunction(name=choice.name))
    names: dict[str, ToolChoice] = {"auto": "auto", "none": "none", "any": "required"}
    return names[choice.type]


def _messages(body: CountTokensRequest, fields: FieldCheck) -> list[ChatMessage]:
    messages = []
    if body.system is not None:
        messages.append(ChatMessage(role="system", content=_text_of(body.system, "system")))
    for i, message in enumerate(body.messages):
        messages += _message(message, f"messages[{i}].content", fields)
    return messages


def _message(message: MessageParam, where: str, fields: FieldCheck) -> list[ChatMessage]:
    """A message; results of tools are messages of their own in the other form, and come before the text."""
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    blocks = [_checked(block, message.role, f"{where}[{i}]", fields) for i, block in enumerate(message.content)]
    results = [
        ChatMessage(
            role="tool",
            tool_call_id=str(block.get("tool_use_id", "")),
            content=_text_of(block.get("content") or "", f"{where}.content"),
        )
        for block in blocks
        if block["type"] == "tool_result"
    ]
    texts = [str(block["text"]) for block in blocks if block["type"] == "text"]
    calls = [_call(block) for block in blocks if block["type"] == "tool_use"]
    thoughts = [str(block.get("thinking", "")) for block in blocks if block["type"] == "thinking"]
    if not texts and not calls and results:
        return results
    own = ChatMessage(
        role=message.role,
        content="\n".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) if thoughts else None,
    )
    return [*results, own]


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": block.get("input")}
    return {"id": block.get("id"), "type": "function", "function": function}


def _checked(block: Mapping[str, Any], role: str, where: str, fields: FieldCheck) -> Mapping[str, Any]:
    kind = block.get("type")
    if kind not in _BLOCKS_OF[role]:
        known = ", ".join(_BLOCKS_OF[role])
        raise RequestError(f"{where}.type={str(kind)[:80]!r} cannot be given to this model, but {known}", where)
    fields.check(block, _BLOCK_FIELDS[str(kind)] | _ANYWHERE, where)
    if kind == "text" and not isinstance(block.get("text"), str):
        raise RequestError(f"{where}.text must be a string", f"{where}.text")
    return block


def _text_of(content: str | Sequence[Mapping[str, Any]], where: str) -> str:
    """Text blocks joined to one text, a line break between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text blocks", where)
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError(f"{where}[{i}] must be a text block", f"{where}[{i}]")
    return "\n".join(str(block["text"]) for block in content)
