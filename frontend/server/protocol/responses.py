"""`/v1/responses`: OpenAI's reference, without what needs a memory on the server."""

from typing import Any, Literal

import msgspec

from folovllm.frontend.server.protocol.chat import TokenLogprob
from folovllm.frontend.server.protocol.sampling import StreamOptions


class ResponsesTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call; the other types of tools run at OpenAI's.

    Attributes:
        type: there is one type.
        name: what it is called by.
        description: what it does, for the model.
        parameters: a JSON schema of its arguments; null: it takes none.
        strict: accepted; where a grammar can hold the arguments to the schema, it always does.
    """

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`tool_choice` that asks for one function.

    Attributes:
        name: one of the offered tools'.
        type: there is one type.
    """

    name: str
    type: Literal["function"] = "function"


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text must look like.

    Attributes:
        type: "text" asks for nothing, "json_object" for any JSON object.
        name: of the schema; not used by the engine.
        schema: for type "json_schema".
        description: for people.
        strict: the answer always keeps to the schema, whatever this says.
    """

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the text is to be.

    Attributes:
        format: what it must look like.
        verbosity: only null or "medium".
    """

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How much the model thinks, where its chat template lets one say so.

    Thoughts are given whole, as `content` of their item; no summary is made, and the items' `summary` is empty.

    Attributes:
        effort: passed to the chat template where it knows it.
        summary, generate_summary: only null or "auto", the best there is.
    """

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/responses`.

    Attributes:
        input: a text, or items: messages, function calls and their outputs, reasoning.
        instructions: a system message before the input.
        model: one of the names that `/v1/models` lists.
        max_output_tokens: most tokens of the answer; null is as many as fit.
        stream, stream_options: the answer comes as events.
        temperature, top_p, top_k, min_p, seed, stop: as in SamplingParams.
        tools, tool_choice, parallel_tool_calls: as for chats.
        text: what the text must look like.
        reasoning: how much the model thinks.
        include: `message.output_text.logprobs` asks for log probabilities of the text's tokens; nothing else can be
            included.
        top_logprobs: alternatives to report with each of them, at most 20.
        cache_salt, priority, timeout_s, request_id, thinking_budget, chat_template_kwargs: as for chats.
        store, background, previous_response_id, conversation, prompt, max_tool_calls, truncation: not supported beyond
            null, false, and "disabled": nothing is kept between two requests.
        metadata, user, safety_identifier, prompt_cache_key, prompt_cache_retention, service_tier: accepted; they
            concern OpenAI's own accounts. `metadata` comes back.
    """

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout_s: float | None = None
    request_id: str | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, kw_only=True, tag="output_text", tag_field="type"):
    """Text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag="reasoning_text", tag_field="type"):
    """Text of thoughts."""

    text: str


class MessageItem(msgspec.Struct, kw_only=True, tag="message", tag_field="type"):
    """A message of the assistant."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, kw_only=True, tag="reasoning", tag_field="type"):
    """Thoughts."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = []


class FunctionCallItem(msgspec.Struct, kw_only=True, tag="function_call", tag_field="type"):
    """A call of a function; its output goes back under `call_id`."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


Item = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the prompt's tokens, those taken from the prefix cache."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the answer's tokens, those of reasoning."""

    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, kw_only=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why the answer is not whole."""

    reason: str


class ResponsesError(msgspec.Struct, kw_only=True):
    """Why the answer failed."""

    code: str
    message: str


class ResponsesAnswer(msgspec.Struct, kw_only=True):
    """The answer; in a stream, what is known of it so far. It repeats what was asked for."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[Item]
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[ResponsesTool]
    error: ResponsesError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    previous_response_id: str | None = None
    reasoning: ReasoningOptions | None = None
    store: bool = False
    temperature: float | None = None
    text: TextOptions | None = None
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None
    background: bool = False
    object: str = "response"


class ResponseEvent(msgspec.Struct, kw_only=True):
    """The answer at a point of its life: created, in progress, and at the end completed, incomplete or failed."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponsesAnswer
    sequence_number: int


class ItemEvent(msgspec.Struct, kw_only=True):
    """An item begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item
    sequence_number: int


class PartEvent(msgspec.Struct, kw_only=True):
    """A part of an item begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    sequence_number: int
    content_index: int = 0


class TextDeltaEvent(msgspec.Struct, kw_only=True):
    """More text of a message, or of thoughts."""

    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    item_id: str
    output_index: int
    delta: str
    sequence_number: int
    content_index: int = 0
    logprobs: list[TokenLogprob] = []


class TextDoneEvent(msgspec.Struct, kw_only=True):
    """The whole text of a message, or of thoughts."""

    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    item_id: str
    output_index: int
    text: str
    sequence_number: int
    content_index: int = 0
    logprobs: list[TokenLogprob] = []


class ArgumentsDeltaEvent(msgspec.Struct, kw_only=True):
    """More of a call's arguments."""

    item_id: str
    output_index: int
    delta: str
    sequence_number: int
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"


class ArgumentsDoneEvent(msgspec.Struct, kw_only=True):
    """All of a call's arguments."""

    item_id: str
    output_index: int
    name: str
    arguments: str
    sequence_number: int
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"


class ErrorEvent(msgspec.Struct, kw_only=True):
    """What went wrong behind the first event; nothing comes after it."""

    code: str | None
    message: str
    param: str | None
    sequence_number: int
    type: Literal["error"] = "error"


ResponsesEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ErrorEvent
)
