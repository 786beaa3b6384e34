"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from folovllm.frontend.outputs import CompletionOutput, RequestOutput
from folovllm.frontend.server.answer_parts import AnswerSplitter, Parts
from folovllm.frontend.server.answers import in_portions, whole
from folovllm.frontend.server.bodies import FieldCheck
from folovllm.frontend.server.chat_call import ChatCall, prepare_chat, render_prompt
from folovllm.frontend.server.context import ServerContext, ignored_header, json_response, request_id_of
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import ANTHROPIC_PREFIX, ApiError, error_body, unavailable
from folovllm.frontend.server.messages_form import to_chat_request, to_counted_request
from folovllm.frontend.server.protocol.messages import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensAnswer,
    CountTokensRequest,
    InputDelta,
    Message,
    MessageDelta,
    MessagesEvent,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessagesUsage,
    StopDelta,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from folovllm.frontend.server.spans import trace_headers
from folovllm.frontend.server.sse import EventStream, encode_named_event, unless_disconnected
from folovllm.frontend.server.thinking import chat_answer
from folovllm.frontend.server.usage import UsageCount


class Messages:
    """Anthropic's messages."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._reader = context.reader(MessagesRequest)
        self._count_reader = context.reader(CountTokensRequest)

    async def create(self, request: Request) -> Response:
        body = await self._reader.read(request)
        self._context.check_open()
        fields = FieldCheck(body, lenient=self._context.options.lenient)
        chat = to_chat_request(body.value, self._context.chat_template, fields)
        call = await prepare_chat(self._context, chat, request_id_of(request), trace_headers(request))
        outputs = chat_answer(self._context, call)
        writer = _Writer(call)
        if not body.value.stream:
            result = await unless_disconnected(request, whole(outputs))
            return json_response(writer.message(result), ignored=fields.ignored)
        return EventStream(
            writer.events(in_portions(outputs, self._context.options.stream_interval)),
            keep_alive_s=self._context.options.keep_alive_s,
            error_event=_error_event,
            headers=ignored_header(fields.ignored),
        )

    async def count_tokens(self, request: Request) -> Response:
        body = await self._count_reader.read(request)
        self._context.check_model(body.value.model)
        fields = FieldCheck(body, lenient=self._context.options.lenient)
        rendered = render_prompt(self._context, to_counted_request(body.value, self._context.chat_template, fields))
        ids = self._context.need_tokenizer().encode(rendered.text, add_special_tokens=False)
        return json_response(CountTokensAnswer(input_tokens=len(ids)), ignored=fields.ignored)


class _Writer:
    """Outputs of one call → what is sent."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._splitter = call.splitter()
        self._usage = UsageCount()
        self._index = -1  # of the block that is open
        self._open: type[Block] | None = None

    def message(self, result: RequestOutput) -> Message:
        """The answer to a request without `stream`."""
        self._usage.add(result)
        (part,) = result.outputs
        parts = self._splitter.whole(part.text)
        content: list[Block] = []
        if parts.reasoning:
            content.append(ThinkingBlock(thinking=parts.reasoning))
        if parts.content:
            content.append(TextBlock(text=parts.content))
        for call in self._splitter.whole_calls(parts.calls):
            content.append(ToolUseBlock(id=call.id, name=call.name, input=msgspec.json.decode(call.arguments)))
        stop = _stop_of(part, self._splitter)
        return self._message(content, stop.stop_reason, stop.stop_sequence)

    def _message(self, content: list[Block], reason: StopReason | None, sequence: str | None) -> Message:
        return Message(
            id=f"msg_{self._call.job.request_id}",
            role="assistant",
            model=self._call.model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._counts(),
        )

    def _counts(self) -> MessagesUsage:
        cached = self._usage.cached_tokens
        return MessagesUsage(
            input_tokens=self._usage.prompt_tokens - cached,
            output_tokens=self._usage.completion_tokens,
            cache_read_input_tokens=cached,
        )

    async def events(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream; what one output brings is one piece of bytes."""
        first = True
        async with aclosing(outputs) as taken:
            async for output in taken:
                if first:
                    self._usage.add(RequestOutput(output.request_id, None, output.prompt_token_ids))
                events: list[MessagesEvent] = [MessageStart(message=self._message([], None, None))] if first else []
                first = False
                self._usage.add(output)
                for part in output.outputs:
                    events += self._of_part(part)
                if events:
                    yield b"".join([encode_named_event(_name(event), event) for event in events])

    def _of_part(self, part: CompletionOutput) -> Iterator[MessagesEvent]:
        parts = self._splitter.push(part.text, last=part.finished)
        yield from self._of_text(parts)
        for call in parts.calls:
            if call.name:
                yield from self._start(ToolUseBlock(id=self._splitter.call_id(call.index), name=call.name, input={}))
            if call.arguments:
                yield BlockDelta(index=self._index, delta=InputDelta(partial_json=call.arguments))
        if part.finished:
            stop = _stop_of(part, self._splitter)
            if self._index < 0:
                yield from self._start(TextBlock(text=""))
            yield BlockStop(index=self._index)
            yield MessageDelta(delta=stop, usage=self._counts())
            yield MessageStop()

    def _of_text(self, parts: Parts) -> Iterator[MessagesEvent]:
        if parts.reasoning:
            if self._open is not ThinkingBlock:
                yield from self._start(ThinkingBlock(thinking=""))
            yield BlockDelta(index=self._index, delta=ThinkingDelta(thinking=parts.reasoning))
        if parts.content:
            if self._open is not TextBlock:
                yield from self._start(TextBlock(text=""))
            yield BlockDelta(index=self._index, delta=TextDelta(text=parts.content))

    def _start(self, block: Block) -> Iterator[MessagesEvent]:
        """Ends the block that is open, and opens the next."""
        if self._index >= 0:
            yield BlockStop(index=self._index)
        self._index += 1
        self._open = type(block)
        yield BlockStart(index=self._index, content_block=block)


def _stop_of(part: CompletionOutput, splitter: AnswerSplitter) -> StopDelta:
    """Raises ApiError where the answer was not ended by the model or its limits."""
    if part.finish_reason == "length":
        return StopDelta(stop_reason="max_tokens", stop_sequence=None)
    if part.finish_reason != "stop":
        raise unavailable(f"the answer was cut off: {part.finish_reason}", "aborted")
    if splitter.num_done:
        return StopDelta(stop_reason="tool_use", stop_sequence=None)
    if isinstance(part.stop_reason, str):
        return StopDelta(stop_reason="stop_sequence", stop_sequence=part.stop_reason)
    return StopDelta(stop_reason="end_turn", stop_sequence=None)


def _name(event: MessagesEvent) -> str:
    return str(event.__struct_config__.tag)


def _error_event(error: ApiError) -> bytes:
    return b"event: error\ndata: " + error_body(error, ANTHROPIC_PREFIX) + b"\n\n"


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    messages = Messages(context)
    return [
        Endpoint(
            "POST",
            "/v1/messages",
            messages.create,
            "Answers a conversation, in Anthropic's form",
            body=MessagesRequest,
            answer=Message,
            events=get_args(MessagesEvent),
        ),
        Endpoint(
            "POST",
            "/v1/messages/count_tokens",
            messages.count_tokens,
            "Counts a prompt's tokens",
            body=CountTokensRequest,
            answer=CountTokensAnswer,
        ),
    ]
