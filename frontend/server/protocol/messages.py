"""`/v1/messages`: Anthropic's reference. Field names and event names are theirs."""

from typing import Any, Literal

import msgspec


class MessageParam(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message.

    Attributes:
        role: user or assistant; an assistant's message at the end is continued.
        content: a text, or blocks: text, tool_use, tool_result, thinking.
    """

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class MessagesTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may use.

    Attributes:
        name: what it is called by.
        input_schema: a JSON schema of its input.
        description: what it does, for the model.
        type: only "custom": tools that run at Anthropic's are not here.
        cache_control: accepted; prompts are cached without being asked.
    """

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None


class MessagesToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which tools must be used.

    Attributes:
        type: "any" at least one, "tool" the one called `name`.
        name: one of the offered tools'.
        disable_parallel_tool_use: true: at most one call.
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model thinks first, where its chat template lets one choose.

    Attributes:
        type: "adaptive" leaves it to the model.
        budget_tokens: most tokens of thoughts.
        display: only null or "summarized"; thoughts are shown as they are.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/messages/count_tokens`, and what `POST /v1/messages` has in common with it.

    Attributes:
        model: one of the names that `/v1/models` lists.
        messages: the conversation.
        system: a text, or text blocks.
        tools, tool_choice: what the model may, or must, use.
        thinking: whether the model thinks first.
    """

    messages: list[MessageParam]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None


class CountTokensAnswer(msgspec.Struct, kw_only=True):
    """Tokens of the prompt."""

    input_tokens: int


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/messages`.

    Attributes:
        max_tokens: most tokens of the answer.
        stop_sequences: strings that end the answer.
        stream: the answer comes as events.
        temperature, top_p, top_k: as in SamplingParams.
        metadata, service_tier: accepted; they concern Anthropic's own accounts.
    """

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class MessagesUsage(msgspec.Struct, kw_only=True):
    """Token counts; what was read from the cache is not counted as input."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class TextBlock(msgspec.Struct, kw_only=True, tag="text", tag_field="type"):
    """Text of the answer."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag="thinking", tag_field="type"):
    """Thoughts before the answer; nothing is signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag="tool_use", tag_field="type"):
    """A use of a tool."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class Message(msgspec.Struct, kw_only=True, tag="message", tag_field="type"):
    """A whole answer; at the start of a stream, one without content."""

    id: str
    role: str
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageStart(msgspec.Struct, kw_only=True, tag="message_start", tag_field="type"):
    """The first event."""

    message: Message


class BlockStart(msgspec.Struct, kw_only=True, tag="content_block_start", tag_field="type"):
    """A block begins; its deltas follow."""

    index: int
    content_block: Block


class TextDelta(msgspec.Struct, kw_only=True, tag="text_delta", tag_field="type"):
    """More text."""

    text: str


class ThinkingDelta(msgspec.Struct, kw_only=True, tag="thinking_delta", tag_field="type"):
    """More thoughts."""

    thinking: str


class InputDelta(msgspec.Struct, kw_only=True, tag="input_json_delta", tag_field="type"):
    """More of a tool's input, as JSON text."""

    partial_json: str


class BlockDelta(msgspec.Struct, kw_only=True, tag="content_block_delta", tag_field="type"):
    """What is new of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(msgspec.Struct, kw_only=True, tag="content_block_stop", tag_field="type"):
    """A block has ended."""

    index: int


class StopDelta(msgspec.Struct, kw_only=True):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, kw_only=True, tag="message_delta", tag_field="type"):
    """The answer has ended; the counts are final."""

    delta: StopDelta
    usage: MessagesUsage


class MessageStop(msgspec.Struct, kw_only=True, tag="message_stop", tag_field="type"):
    """The last event."""


MessagesEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class MessagesError(msgspec.Struct, kw_only=True):
    """Kind of error, and the message for people."""

    type: str
    message: str


class MessagesErrorAnswer(msgspec.Struct, kw_only=True, tag="error", tag_field="type"):
    """Anthropic's form of an error."""

    error: MessagesError
