"""A chat request → a job for the engine, and parsers for its answers. All chat-like endpoints come through here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from folovllm.common.errors import RequestError
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend.prompts import RenderedChat
from folovllm.frontend.server.answer_parts import AnswerSplitter
from folovllm.frontend.server.answers import Job, to_prompt
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.conversation import to_messages, to_tools
from folovllm.frontend.server.parsers.base import AnswerContext, ReasoningFormat, ToolFormat
from folovllm.frontend.server.protocol.chat import ChatRequest
from folovllm.frontend.server.protocol.tools import NamedToolChoice, Tool
from folovllm.frontend.server.sampling import MAX_TOP_LOGPROBS, structured_outputs, to_sampling_params
from folovllm.frontend.server.spans import SpanOrigin


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked chat request.

    Attributes:
        body: as it came.
        job: for the engine.
        model: the name to tell in answers.
        num_top: alternatives to report with each token; None: no log probabilities.
        tool_format, reasoning_format: of its answers; None where there is nothing to be found.
        answer_context: for the parsers; None where there is none.
    """

    body: ChatRequest
    job: Job
    model: str
    num_top: int | None
    tool_format: ToolFormat | None
    reasoning_format: ReasoningFormat | None
    answer_context: AnswerContext | None

    def splitter(self) -> AnswerSplitter:
        """Parsers of one answer."""
        if self.answer_context is None:
            return AnswerSplitter()
        return AnswerSplitter(
            self.reasoning_format.make(self.answer_context) if self.reasoning_format else None,
            self.tool_format.make(self.answer_context) if self.tool_format else None,
            max_calls=1 if self.body.parallel_tool_calls is False else None,
        )


async def prepare_chat(
    context: ServerContext, body: ChatRequest, request_id: str, trace: Mapping[str, str] | None = None
) -> ChatCall:
    """Checks a request and renders its prompt. Raises ApiError and RequestError; nothing is sent to the engine.

    Args:
        context: of the server.
        body: as it came, or as another API's request was put.
        request_id: where the body has none.
        trace: headers of the trace context (`spans.trace_headers`).
    """
    model = context.check_model(body.model)
    num_top = _check(body)
    tools = _offered(body)
    tool_format = _tool_format(context, body, tools)
    reasoning_format = context.reasoning_format
    rendered = render_prompt(context, body)
    constraint = _constraint(body, tools, tool_format)
    has_constraint = constraint is not None or structured_outputs(body) is not None
    _check_budget(body, reasoning_format, has_constraint=has_constraint)
    answer_context = _answer_context(context, body, tools, rendered) if tool_format or reasoning_format else None
    if has_constraint and reasoning_format is not None and answer_context is not None:
        answer_context = _without_thoughts(answer_context, reasoning_format)
    keeps_special = any(format_ and format_.keep_special_tokens for format_ in (tool_format, reasoning_format))
    params = to_sampling_params(
        body,
        max_tokens=_max_tokens(body),
        logprobs=num_top,
        structured_outputs=constraint,
        skip_special_tokens=False if keeps_special else None,
    )
    text = rendered.text if answer_context is None else answer_context.prompt
    prompt = await to_prompt(context, text, add_special_tokens=False, cache_salt=body.cache_salt)
    origin = SpanOrigin("chat", model, trace or {})
    job = Job(prompt, params, body.request_id or request_id, body.priority or 0, origin)
    return ChatCall(body, job, model, num_top, tool_format, reasoning_format, answer_context)


def render_prompt(context: ServerContext, body: ChatRequest) -> RenderedChat:
    """The conversation as the chat template writes it. Raises RequestError."""
    options = _template_options(context, body, _offered(body))
    return context.llm.render_chat(to_messages(body.messages), **options)


def _offered(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of."""
    return [] if body.tool_choice == "none" else body.tools or []


def _answer_context(
    context: ServerContext, body: ChatRequest, tools: list[Tool], rendered: RenderedChat
) -> AnswerContext:
    return AnswerContext(
        tokenizer=context.need_tokenizer(),
        prompt=rendered.text,
        tools=tools,
        tool_choice=body.tool_choice or ("auto" if tools else "none"),
        template_kwargs=body.chat_template_kwargs or {},
    )


def _without_thoughts(given: AnswerContext, reasoning_format: ReasoningFormat) -> AnswerContext:
    """Thoughts that the template opened are closed in the prompt: a grammar holds the answer from its first token on.

    Left open, the model would be made to think in JSON, and the parser would take the answer for thoughts.
    """
    parser = reasoning_format.make(given)
    return replace(given, prompt=given.prompt + parser.close_text) if parser.in_reasoning else given


def _check(body: ChatRequest) -> int | None:
    """Raises RequestError; returns how many alternatives are to be reported, None for no log probabilities."""
    if not body.messages:
        raise RequestError("messages is empty: a chat has at least one message", "messages")
    if body.modalities not in (None, ["text"]):
        raise RequestError('modalities must be ["text"]', "modalities")
    if not body.logprobs:
        if body.top_logprobs is not None and (body.logprobs is False or body.top_logprobs):
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        return None
    num_top = body.top_logprobs or 0
    if not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs={num_top} must lie between 0 and {MAX_TOP_LOGPROBS}", "top_logprobs")
    return num_top


def _check_budget(body: ChatRequest, reasoning_format: ReasoningFormat | None, *, has_constraint: bool) -> None:
    """Raises RequestError where thoughts cannot be bounded (`thinking`)."""
    budget = body.thinking_budget
    if budget is None:
        return
    if budget < 1:
        raise RequestError(f"thinking_budget={budget} must be at least 1", "thinking_budget")
    if reasoning_format is None:
        raise RequestError(
            "this server does not know how its model writes thoughts; start it with --reasoning-parser NAME",
            "thinking_budget",
        )
    for name, is_given in (
        ("n > 1", (body.n or 1) > 1),
        ("logprobs", bool(body.logprobs)),
        ("prompt_logprobs", body.prompt_logprobs is not None),
        ("structured outputs, or a tool_choice that asks for a call", has_constraint),
    ):
        if is_given:
            raise RequestError(f"thinking_budget does not go with {name}", "thinking_budget")


def _max_tokens(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    return old if new is None else new


def _template_options(context: ServerContext, body: ChatRequest, tools: list[Tool]) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in context.chat_template:
            raise RequestError("this model's chat template knows no reasoning_effort", "reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    continued = bool(body.continue_final_message)
    return {
        "add_generation_prompt": not continued if body.add_generation_prompt is None else body.add_generation_prompt,
        "continue_final_message": continued,
        "tools": to_tools(tools),
        "chat_template_kwargs": variables,
    }


def _tool_format(context: ServerContext, body: ChatRequest, tools: list[Tool]) -> ToolFormat | None:
    """What finds the calls; None where none can be made. Raises RequestError."""
    choice = body.tool_choice
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise RequestError("tool_choice asks for a call, but there are no tools", "tool_choice")
    if isinstance(choice, NamedToolChoice) and all(tool.function.name != choice.function.name for tool in tools):
        raise RequestError(
            f"tool_choice names {choice.function.name[:80]!r}, which is none of the tools", "tool_choice"
        )
    if context.tool_format is None:
        raise RequestError(
            "this server does not know how its model writes tool calls; start it with --tool-parser NAME", "tools"
        )
    return context.tool_format


def _constraint(body: ChatRequest, tools: list[Tool], tool_format: ToolFormat | None) -> StructuredOutputsParams | None:
    """What holds the answer to a call where one is asked for."""
    choice = body.tool_choice
    if tool_format is None or choice in (None, "auto", "none"):
        return None
    assert choice is not None, "None is handled above"
    if tool_format.constraint is None:
        raise RequestError("this model's tool calls have no grammar: tool_choice can be auto or none", "tool_choice")
    return StructuredOutputsParams(**tool_format.constraint(tools, choice, body.parallel_tool_calls is not False))
