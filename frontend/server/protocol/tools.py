"""Tools that a request offers, and calls that an answer makes, in OpenAI's form."""

from typing import Any, Literal

import msgspec


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call.

    Attributes:
        name: what it is called by.
        description: what it does, for the model.
        parameters: a JSON schema of its arguments; null: it takes none.
        strict: accepted; where a grammar can hold the arguments to the schema, it always does.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One entry of `tools`.

    Attributes:
        function: what may be called.
        type: there is one type.
    """

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of one function.

    Attributes:
        name: one of the offered tools'.
    """

    name: str


class NamedToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`tool_choice` that asks for one function.

    Attributes:
        function: the one that is to be called.
        type: there is one type.
    """

    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["auto", "none", "required"] | NamedToolChoice


class FunctionCall(msgspec.Struct, kw_only=True):
    """What is called, with which arguments (a JSON text)."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A whole call in an answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is new of a call: its name comes once, its arguments in pieces that join to the JSON text."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is new of one call in a stream; `id`, `type` and the name come once for each index, in its first delta."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta | None = None
