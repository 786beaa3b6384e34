"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.frontend.server.answer_parts import AnswerSplitter, Parts
from folovllm.frontend.server.answers import in_portions, whole
from folovllm.frontend.server.chat_call import ChatCall, prepare_chat
from folovllm.frontend.server.context import ServerContext, ignored_header, json_response, request_id_of
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.logprobs import chat_logprobs, prompt_logprobs
from folovllm.frontend.server.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatRequest,
    ChoiceLogprobs,
)
from folovllm.frontend.server.protocol.common import Usage
from folovllm.frontend.server.protocol.tools import FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta
from folovllm.frontend.server.sampling import refuse_stream
from folovllm.frontend.server.spans import trace_headers
from folovllm.frontend.server.sse import DONE, EventStream, encode_event, error_event, unless_disconnected
from folovllm.frontend.server.thinking import chat_answer
from folovllm.frontend.server.usage import UsageCount

_ROLE = "assistant"


class ChatCompletions:
    """Chats."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._reader = context.reader(ChatRequest)

    async def create(self, request: Request) -> Response:
        body = await self._reader.read(request)
        self._context.check_open()
        call = await prepare_chat(self._context, body.value, request_id_of(request), trace_headers(request))
        outputs = chat_answer(self._context, call)
        writer = _Writer(self._context, call)
        if not body.value.stream:
            result = await unless_disconnected(request, whole(outputs))
            return json_response(writer.completion(result), ignored=body.ignored)
        return EventStream(
            writer.events(in_portions(outputs, self._context.options.stream_interval)),
            keep_alive_s=self._context.options.keep_alive_s,
            error_event=error_event,
            headers=ignored_header(body.ignored),
        )

    async def complete(self, data: bytes, request_id: str) -> ChatCompletion:
        """The whole answer to a body, without HTTP; its `stream` must be off. Raises ApiError and FoloVLLMError."""
        body = self._reader.decode(data).value
        refuse_stream(body)
        call = await prepare_chat(self._context, body, request_id)
        return _Writer(self._context, call).completion(await whole(chat_answer(self._context, call)))


class _Answer:
    """One answer of a stream: its parsers, and log probabilities that no chunk has had yet."""

    def __init__(self, splitter: AnswerSplitter) -> None:
        self.splitter = splitter
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []


class _Writer:
    """Outputs of one call → what is sent."""

    def __init__(self, context: ServerContext, call: ChatCall) -> None:
        self._context = context
        self._call = call
        self._id = f"chatcmpl-{call.job.request_id}"
        self._created = int(time.time())
        self._usage = UsageCount()
        self._answers: dict[int, _Answer] = {}

    def completion(self, result: RequestOutput) -> ChatCompletion:
        """The answer to a request without `stream`."""
        self._usage.add(result)
        choices = [self._choice(part) for part in result.outputs]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._call.model,
            choices=choices,
            usage=self._usage.usage(),
            prompt_logprobs=prompt_logprobs(result.prompt_logprobs),
        )

    def _choice(self, part: CompletionOutput) -> ChatChoice:
        splitter = self._call.splitter()
        parts = splitter.whole(part.text)
        calls = splitter.whole_calls(parts.calls)
        self._count_reasoning(splitter)
        shows_reasoning = parts.reasoning and self._call.body.include_reasoning is not False
        message = AssistantMessage(
            role=_ROLE,
            content=parts.content if parts.content or not (calls or parts.reasoning) else None,
            refusal=None,
            reasoning_content=parts.reasoning if shows_reasoning else None,
            tool_calls=[
                ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments)) for call in calls
            ]
            or None,
        )
        return ChatChoice(
            index=part.index,
            message=message,
            finish_reason=_finish_reason(part, splitter) or "stop",
            logprobs=self._logprobs(part.token_ids, part.logprobs or []),
            stop_reason=part.stop_reason,
        )

    async def events(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream; what one output brings is one piece of bytes."""
        options = self._call.body.stream_options
        in_each = bool(options and options.continuous_usage_stats)
        async with aclosing(outputs) as parts:
            async for output in parts:
                self._usage.add(output)
                usage = self._usage.usage() if in_each else None
                choices = [choice for part in output.outputs for choice in self._deltas(part)]
                if choices:
                    yield b"".join([encode_event(self._chunk([choice], usage)) for choice in choices])
        if options and options.include_usage:
            yield encode_event(self._chunk([], self._usage.usage()))
        yield DONE

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._call.model,
            choices=choices,
            usage=usage,
        )

    def _deltas(self, part: CompletionOutput) -> list[ChatChunkChoice]:
        """The role first, then what is new; nothing where there are only tokens that have no text yet."""
        choices = []
        if part.index not in self._answers:
            self._answers[part.index] = _Answer(self._call.splitter())
            choices.append(ChatChunkChoice(index=part.index, delta=ChatDelta(role=_ROLE, content="")))
        found = self._answers[part.index]
        if part.logprobs:
            found.token_ids += part.token_ids
            found.logprobs += part.logprobs
        parts = found.splitter.push(part.text, last=part.finished)
        if part.finished:
            self._count_reasoning(found.splitter)
        if self._call.body.include_reasoning is False:
            parts.reasoning = ""
        if parts or part.finished:
            choices.append(self._delta(part, found, parts))
        return choices

    def _delta(self, part: CompletionOutput, found: _Answer, parts: Parts) -> ChatChunkChoice:
        delta = ChatDelta(
            content=parts.content or None,
            reasoning_content=parts.reasoning or None,
            tool_calls=_call_deltas(found.splitter, parts) or None,
        )
        logprobs = self._logprobs(found.token_ids, found.logprobs) if found.logprobs else None
        found.token_ids, found.logprobs = [], []
        return ChatChunkChoice(
            index=part.index,
            delta=delta,
            finish_reason=_finish_reason(part, found.splitter),
            logprobs=logprobs,
            stop_reason=part.stop_reason,
        )

    def _logprobs(self, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob]]) -> ChoiceLogprobs | None:
        if self._call.num_top is None:
            return None
        return chat_logprobs(self._context.need_tokenizer(), token_ids, entries, self._call.num_top)

    def _count_reasoning(self, splitter: AnswerSplitter) -> None:
        if splitter.reasoning:
            tokenizer = self._context.need_tokenizer()
            self._usage.reasoning_tokens += len(tokenizer.encode(splitter.reasoning, add_special_tokens=False))


def _finish_reason(part: CompletionOutput, splitter: AnswerSplitter) -> ChatFinishReason | None:
    """A call that the limit cut off is no call: the reason stays "length"."""
    return "tool_calls" if part.finish_reason == "stop" and splitter.num_done else part.finish_reason


def _call_deltas(splitter: AnswerSplitter, parts: Parts) -> list[ToolCallDelta]:
    """What is new of the calls; that a call is done changes nothing by itself."""
    return [
        ToolCallDelta(
            index=call.index,
            id=splitter.call_id(call.index) if call.name else None,
            type="function" if call.name else None,
            function=FunctionCallDelta(name=call.name or None, arguments=call.arguments),
        )
        for call in parts.calls
        if call.name or call.arguments
    ]


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    return [
        Endpoint(
            "POST",
            "/v1/chat/completions",
            ChatCompletions(context).create,
            "Answers a conversation",
            body=ChatRequest,
            answer=ChatCompletion,
            events=(ChatChunk,),
        )
    ]
