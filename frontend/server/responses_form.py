"""A Responses request → the chat request that every chat-like endpoint comes down to."""

from collections.abc import Mapping, Sequence
from typing import Any

from folovllm.common.errors import RequestError
from folovllm.frontend.server.bodies import FieldCheck
from folovllm.frontend.server.protocol.chat import ChatMessage, ChatRequest
from folovllm.frontend.server.protocol.responses import NamedTool, ResponsesRequest, TextFormat
from folovllm.frontend.server.protocol.sampling import JsonSchema, ResponseFormat
from folovllm.frontend.server.protocol.tools import FunctionDefinition, NamedFunction, NamedToolChoice, Tool, ToolChoice

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "store": (None, False),
    "background": (None, False),
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "max_tool_calls": (None,),
    "truncation": (None, "disabled"),
}
_ITEM_FIELDS: Mapping[str, frozenset[str]] = {
    "message": frozenset({"role", "content", "phase"}),
    "function_call": frozenset({"call_id", "name", "arguments"}),
    "function_call_output": frozenset({"call_id", "output"}),
    "reasoning": frozenset({"summary", "content", "encrypted_content"}),
}
_ANYWHERE = frozenset({"type", "id", "status"})
_LOGPROBS = "message.output_text.logprobs"


def to_chat_request(body: ResponsesRequest, fields: FieldCheck) -> ChatRequest:
    """The same request in the other form. Raises RequestError for what has no counterpart.

    Args:
        body: as it came.
        fields: what is done about unknown fields of its items.
    """
    _check(body)
    text_format = body.text.format if body.text else None
    return ChatRequest(
        model=body.model,
        messages=_messages(body, fields),
        max_completion_tokens=body.max_output_tokens,
        stream=body.stream,
        stream_options=body.stream_options,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stop,
        tools=_tools(body),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        logprobs=_LOGPROBS in (body.include or []),
        top_logprobs=body.top_logprobs or None,
        response_format=None if text_format is None else _response_format(text_format),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        cache_salt=body.cache_salt,
        priority=body.priority,
        timeout_s=body.timeout_s,
        request_id=body.request_id,
        thinking_budget=body.thinking_budget,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _check(body: ResponsesRequest) -> None:
    for name, neutral in _UNSUPPORTED.items():
        if getattr(body, name) not in neutral:
            raise RequestError(f"{name} is not supported: nothing is kept between two requests", name)
    _check_include(body)
    for name in ("summary", "generate_summary"):
        if body.reasoning and getattr(body.reasoning, name) not in (None, "auto"):
            raise RequestError("thoughts are given as they are, not summarized", f"reasoning.{name}")
    if body.text and body.text.verbosity not in (None, "medium"):
        raise RequestError("text.verbosity is not supported", "text.verbosity")


def _check_include(body: ResponsesRequest) -> None:
    for name in body.include or []:
        if name != _LOGPROBS:
            raise RequestError(f"include={name[:80]!r} is not supported, only {_LOGPROBS!r}", "include")
    if not body.include:
        if body.top_logprobs:
            raise RequestError(f"top_logprobs needs include=[{_LOGPROBS!r}]", "top_logprobs")
    elif body.tools:
        raise RequestError("log probabilities and tools do not go together: a call is no text", "include")


def _tools(body: ResponsesRequest) -> list[Tool] | None:
    if not body.tools:
        return None
    return [
        Tool(
            function=FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
        )
        for tool in body.tools
    ]


def _tool_choice(choice: Any) -> ToolChoice | None:
    if isinstance(choice, NamedTool):
        return NamedToolChoice(function=NamedFunction(name=choice.name))
    named: ToolChoice | None = choice
    return named


def _response_format(text_format: TextFormat) -> ResponseFormat:
    if text_format.type != "json_schema":
        return ResponseFormat(type=text_format.type)
    if text_format.schema is None:
        raise RequestError('text.format of type "json_schema" needs a schema', "text.format.schema")
    return ResponseFormat(
        type="json_schema", json_schema=JsonSchema(name=text_format.name or "", schema=text_format.schema)
    )


def _messages(body: ResponsesRequest, fields: FieldCheck) -> list[ChatMessage]:
    messages = [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    thoughts: str | None = None
    for i, item in enumerate(body.input):
        where = f"input[{i}]"
        kind = _kind(item, where)
        fields.check(item, _ITEM_FIELDS[kind] | _ANYWHERE, where)
        if kind == "reasoning":
            thoughts = _text_of(item.get("content") or [], f"{where}.content")
        elif kind == "message":
            made = _message(item, where)
            made.reasoning_content = thoughts if made.role == "assistant" else None
            messages.append(made)
            thoughts = None
        elif kind == "function_call":
            _add_call(messages, item, thoughts)
            thoughts = None
        else:
            output = _text_of(item.get("output") or "", f"{where}.output")
            messages.append(ChatMessage(role="tool", tool_call_id=str(item.get("call_id", "")), content=output))
    return messages


def _kind(item: Mapping[str, Any], where: str) -> str:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
        known = ", ".join(_ITEM_FIELDS)
        raise RequestError(f"{where}.type={str(kind)[:80]!r} cannot be given to this model, but {known}", where)
    return kind


def _message(item: Mapping[str, Any], where: str) -> ChatMessage:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise RequestError(f"{where} needs a role and a content", where)
    return ChatMessage(role=role, content=_text_of(content, f"{where}.content"))


def _add_call(messages: list[ChatMessage], item: Mapping[str, Any], thoughts: str | None) -> None:
    """Calls that stand behind each other, or behind an assistant's message, are one message in the other form."""
    if not messages or messages[-1].role != "assistant" or thoughts is not None:
        messages.append(ChatMessage(role="assistant", content=None, reasoning_content=thoughts))
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]


def _text_of(content: str | Sequence[Mapping[str, Any]], where: str) -> str:
    """Parts joined to one text, a line break between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text parts", where)
    texts = []
    for i, part in enumerate(content):
        text = part.get("refusal" if part.get("type") == "refusal" else "text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise RequestError(f"{where}[{i}] must be a text part: this model takes text only", f"{where}[{i}]")
        texts.append(text)
    return "\n".join(texts)
