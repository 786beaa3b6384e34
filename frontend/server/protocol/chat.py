"""`/v1/chat/completions`: OpenAI's reference, with vLLM's extras."""

from typing import Any, Literal

import msgspec

from folovllm.frontend.server.protocol.common import Usage
from folovllm.frontend.server.protocol.sampling import SamplingFields
from folovllm.frontend.server.protocol.tools import Tool, ToolCall, ToolCallDelta, ToolChoice


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of the conversation; `frontend.chat_template` checks what stands in it.

    Attributes:
        role: system, developer, user, assistant or tool.
        content: text, a list of text parts, or null.
        name: of the speaker, for templates that show it.
        tool_calls: calls that an assistant's message made.
        tool_call_id: the call that a tool's message answers.
        reasoning_content, reasoning: an assistant's thoughts; the template decides whether it shows them.
        refusal, annotations, audio, function_call: as OpenAI's clients send them back; only null or empty.
    """

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`.

    Attributes:
        messages: the conversation.
        max_completion_tokens, max_tokens: most tokens of each answer (the same; at most one): null is as many as fit.
        logprobs: report the tokens' log probabilities.
        top_logprobs: so many alternatives with each; needs `logprobs`.
        tools: functions that the model may call.
        tool_choice: "none", "auto" (with tools, the default), "required", or one function.
        parallel_tool_calls: false: at most one call.
        reasoning_effort: passed to the chat template where it knows it.
        include_reasoning: false leaves the reasoning out of the answer.
        thinking_budget: most tokens of reasoning; then it is closed, and the answer goes on.
        add_generation_prompt, continue_final_message, chat_template_kwargs: how the conversation becomes a prompt.
        modalities: only null or ["text"].
    """

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    thinking_budget: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None


class TopLogprob(msgspec.Struct, kw_only=True):
    """One token that was possible at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct, kw_only=True):
    """The token that was taken at a position, and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(msgspec.Struct, kw_only=True):
    """Log probabilities of an answer, one entry for each token."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "abort", "timeout", "error"]


class AssistantMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole answer.

    Attributes:
        role: always assistant.
        content: its text; null where it only calls tools.
        reasoning_content: its thoughts, where a reasoning parser found some.
        tool_calls: whole calls, at least one.
        refusal: always null.
    """

    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: ChoiceLogprobs | None = None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to a request without `stream`. `prompt_logprobs`: per prompt token, id → log probability."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[int, dict[str, Any]] | None] | None = None


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is new of an answer; the first one of each index holds its role."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What is new of one of the `n` answers; `finish_reason` is set once, in its last chunk."""

    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChoiceLogprobs | None = None
    stop_reason: int | str | None = None


class ChatChunk(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event of a stream; `usage` comes last, with `choices` empty, where it was asked for."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
