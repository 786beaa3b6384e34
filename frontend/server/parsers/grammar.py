"""Lark grammars that hold an answer to calls: the functions' names, and each one's schema for its arguments."""

import json
from collections.abc import Sequence
from typing import Any

from folovllm.frontend.server.protocol.tools import NamedToolChoice, Tool, ToolChoice

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(
    tools: Sequence[Tool], choice: ToolChoice, *, around: tuple[str, str], arguments: str, between: str | None
) -> str:
    """A grammar of one call, or more.

    Args:
        tools: those offered; the grammar has those that `choice` allows.
        choice: "required", or one function.
        around: what stands before and behind a call.
        arguments: the object's key of the arguments.
        between: what stands between two calls; None: there is only one.
    """
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    allowed = [tool.function for tool in tools if named in (None, tool.function.name)]
    ways = " | ".join(f"call_{i}" for i in range(len(allowed)))
    lines = [
        "start: call" if between is None else f"start: call ({_literal(between)} call)*",
        f"call: {_literal(around[0])} ({ways}) {_literal(around[1])}" if any(around) else f"call: {ways}",
    ]
    for i, function in enumerate(allowed):
        head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{arguments}": '
        lines.append(f'call_{i}: {_literal(head)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(_schema(function.parameters), ensure_ascii=False)}")
    return "\n".join(lines)


def _schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """What the arguments look like: an object, whether or not the schema says so."""
    return _NO_ARGUMENTS if parameters is None else {"type": "object", **parameters}


def _literal(text: str) -> str:
    """A text as Lark writes it, which is JSON's way."""
    return json.dumps(text, ensure_ascii=False)
