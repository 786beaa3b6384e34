"""`POST /v1/responses`: OpenAI's Responses API, stateless."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.frontend.server.answers import in_portions, whole
from folovllm.frontend.server.bodies import FieldCheck
from folovllm.frontend.server.chat_call import ChatCall, prepare_chat
from folovllm.frontend.server.context import ServerContext, ignored_header, json_response, request_id_of
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import ApiError
from folovllm.frontend.server.logprobs import content_logprobs, tokens_behind
from folovllm.frontend.server.parsers.base import CallDelta
from folovllm.frontend.server.protocol.chat import TokenLogprob
from folovllm.frontend.server.protocol.responses import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
    ResponsesAnswer,
    ResponsesEvent,
    ResponsesRequest,
    ResponsesUsage,
    TextDeltaEvent,
    TextDoneEvent,
)
from folovllm.frontend.server.responses_form import to_chat_request
from folovllm.frontend.server.spans import trace_headers
from folovllm.frontend.server.sse import EventStream, encode_named_event, unless_disconnected
from folovllm.frontend.server.thinking import chat_answer
from folovllm.frontend.server.usage import UsageCount

_Ending = Literal["completed", "incomplete"]


class Responses:
    """Responses."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._reader = context.reader(ResponsesRequest)

    async def create(self, request: Request) -> Response:
        body = await self._reader.read(request)
        self._context.check_open()
        fields = FieldCheck(body, lenient=self._context.options.lenient)
        chat = to_chat_request(body.value, fields)
        call = await prepare_chat(self._context, chat, request_id_of(request), trace_headers(request))
        outputs = chat_answer(self._context, call)
        writer = _Writer(self._context, body.value, call)
        if not body.value.stream:
            result = await unless_disconnected(request, whole(outputs))
            return json_response(writer.whole(result), ignored=fields.ignored)
        return EventStream(
            writer.events(in_portions(outputs, self._context.options.stream_interval)),
            keep_alive_s=self._context.options.keep_alive_s,
            error_event=writer.error_event,
            headers=ignored_header(fields.ignored),
        )


class _Writer:
    """Outputs of one call → what is sent. Items are made as the parts of the answer come; the last one is open."""

    def __init__(self, context: ServerContext, body: ResponsesRequest, call: ChatCall) -> None:
        self._context = context
        self._body = body
        self._call = call
        self._created = int(time.time())
        self._splitter = call.splitter()
        self._usage = UsageCount()
        self._items: list[Item] = []
        self._tokens: list[tuple[int, dict[int, Logprob]]] = []  # of a text of which nothing has been told yet
        self._text = ""
        self._is_open = False
        self._number = 0  # of the next event

    def whole(self, result: RequestOutput) -> ResponsesAnswer:
        """The answer to a request without `stream`."""
        self._usage.add(result)
        (part,) = result.outputs
        parts = self._splitter.whole(part.text)
        ending = _ending(part)
        if parts.reasoning:
            self._items.append(
                ReasoningItem(id=_id("rs"), status=ending, content=[ReasoningText(text=parts.reasoning)])
            )
        if parts.content or not (parts.reasoning or parts.calls):
            self._take(part)
            text = OutputText(text=parts.content, logprobs=self._logprobs(parts.content))
            self._items.append(MessageItem(id=_id("msg"), status=ending, content=[text]))
        for call in self._splitter.whole_calls(parts.calls):
            self._items.append(
                FunctionCallItem(
                    id=_id("fc"), status="completed", call_id=call.id, name=call.name, arguments=call.arguments
                )
            )
        return self._answer(ending, part)

    def _answer(
        self, status: Literal["in_progress", "completed", "incomplete"], part: CompletionOutput | None = None
    ) -> ResponsesAnswer:
        body = self._body
        reason = "max_output_tokens" if part is None or part.finish_reason == "length" else str(part.finish_reason)
        choice: Any = msgspec.to_builtins(body.tool_choice or ("auto" if body.tools else "none"))
        return ResponsesAnswer(
            id=f"resp_{self._call.job.request_id}",
            created_at=self._created,
            model=self._call.model,
            status=status,
            output=[] if status == "in_progress" else self._items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            tool_choice=choice,
            tools=body.tools or [],
            incomplete_details=IncompleteDetails(reason=reason) if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            reasoning=body.reasoning,
            temperature=body.temperature,
            text=body.text,
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
            usage=None if status == "in_progress" else self._counts(),
            user=body.user,
        )

    def _take(self, part: CompletionOutput) -> None:
        """Keeps what is new until the parser says what it is."""
        if part.logprobs is not None:
            self._tokens += zip(part.token_ids, part.logprobs, strict=True)
            self._text += part.text

    def _logprobs(self, content: str) -> list[TokenLogprob]:
        """Those of the text's end; what is before it belongs to thoughts, whose log probabilities nobody asks for."""
        if self._call.num_top is None:
            return []
        tokenizer = self._context.need_tokenizer()
        found = content_logprobs(tokenizer, self._tokens, self._text, content, self._call.num_top)
        self._tokens, self._text = tokens_behind(self._tokens), ""
        return found

    def _counts(self) -> ResponsesUsage:
        thoughts = self._splitter.reasoning
        num_thoughts = len(self._context.need_tokenizer().encode(thoughts, add_special_tokens=False)) if thoughts else 0
        return ResponsesUsage(
            input_tokens=self._usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=self._usage.cached_tokens),
            output_tokens=self._usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=num_thoughts),
            total_tokens=self._usage.prompt_tokens + self._usage.completion_tokens,
        )

    async def events(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream; what one output brings is one piece of bytes."""
        async with aclosing(outputs) as taken:
            async for output in taken:
                self._usage.add(output)
                events: list[ResponsesEvent] = []
                if not self._number:
                    events += self._beginning()
                for part in output.outputs:
                    events += self._of_part(part)
                if events:
                    yield b"".join([encode_named_event(event.type, event) for event in events])

    def error_event(self, error: ApiError) -> bytes:
        """The event that tells of an error behind the first event."""
        event = ErrorEvent(
            code=error.code or error.kind, message=str(error), param=error.param, sequence_number=self._next()
        )
        return encode_named_event(event.type, event)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _beginning(self) -> Iterator[ResponsesEvent]:
        answer_so_far = self._answer("in_progress")
        yield ResponseEvent(type="response.created", response=answer_so_far, sequence_number=self._next())
        yield ResponseEvent(type="response.in_progress", response=answer_so_far, sequence_number=self._next())

    def _of_part(self, part: CompletionOutput) -> Iterator[ResponsesEvent]:
        self._take(part)
        parts = self._splitter.push(part.text, last=part.finished)
        if parts.reasoning:
            yield from self._more_text(parts.reasoning, ReasoningItem)
        if parts.content:
            yield from self._more_text(parts.content, MessageItem)
        for call in parts.calls:
            yield from self._more_of_call(call)
        if part.finished:
            if not self._items:
                yield from self._open(MessageItem)
            ending = _ending(part)
            yield from self._close(ending)
            event: Literal["response.completed", "response.incomplete"] = (
                "response.completed" if ending == "completed" else "response.incomplete"
            )
            yield ResponseEvent(type=event, response=self._answer(ending, part), sequence_number=self._next())

    def _more_text(self, text: str, kind: type[MessageItem] | type[ReasoningItem]) -> Iterator[ResponsesEvent]:
        if not (self._is_open and isinstance(self._items[-1], kind)):
            yield from self._open(kind)
        item = self._items[-1]
        assert not isinstance(item, FunctionCallItem), "an item of this kind was opened"
        item.content[0].text += text
        logprobs = self._logprobs(text) if isinstance(item, MessageItem) else []
        if isinstance(item, MessageItem):
            item.content[0].logprobs = [*item.content[0].logprobs, *logprobs]
        yield TextDeltaEvent(
            type="response.output_text.delta" if kind is MessageItem else "response.reasoning_text.delta",
            item_id=item.id,
            output_index=len(self._items) - 1,
            delta=text,
            logprobs=logprobs,
            sequence_number=self._next(),
        )

    def _more_of_call(self, call: CallDelta) -> Iterator[ResponsesEvent]:
        if call.name:
            made = FunctionCallItem(
                id=_id("fc"),
                status="in_progress",
                call_id=self._splitter.call_id(call.index),
                name=call.name,
                arguments="",
            )
            yield from self._add(made, msgspec.structs.replace(made))
        item = self._items[-1]
        if call.arguments and isinstance(item, FunctionCallItem):
            item.arguments += call.arguments
            yield ArgumentsDeltaEvent(
                item_id=item.id,
                output_index=len(self._items) - 1,
                delta=call.arguments,
                sequence_number=self._next(),
            )
        if call.done:
            yield from self._close("completed")

    def _open(self, kind: type[MessageItem] | type[ReasoningItem]) -> Iterator[ResponsesEvent]:
        """Begins an item of text; it has one part, which is told by itself."""
        item: MessageItem | ReasoningItem
        part: OutputText | ReasoningText
        if kind is MessageItem:
            part = OutputText(text="")
            item = MessageItem(id=_id("msg"), status="in_progress", content=[part])
        else:
            part = ReasoningText(text="")
            item = ReasoningItem(id=_id("rs"), status="in_progress", content=[part])
        yield from self._add(item, msgspec.structs.replace(item, content=[]))
        yield PartEvent(
            type="response.content_part.added",
            item_id=item.id,
            output_index=len(self._items) - 1,
            part=msgspec.structs.replace(part),
            sequence_number=self._next(),
        )

    def _add(self, item: Item, told: Item) -> Iterator[ResponsesEvent]:
        """Ends the item that is open and begins this one; `told` is what it is at first."""
        yield from self._close("completed")
        self._items.append(item)
        self._is_open = True
        yield ItemEvent(
            type="response.output_item.added",
            output_index=len(self._items) - 1,
            item=told,
            sequence_number=self._next(),
        )

    def _close(self, status: ItemStatus) -> Iterator[ResponsesEvent]:
        if not self._is_open:
            return
        self._is_open = False
        index, item = len(self._items) - 1, self._items[-1]
        item.status = status
        if isinstance(item, FunctionCallItem):
            yield ArgumentsDoneEvent(
                item_id=item.id,
                output_index=index,
                name=item.name,
                arguments=item.arguments,
                sequence_number=self._next(),
            )
        else:
            part = item.content[0]
            yield TextDoneEvent(
                type="response.output_text.done" if isinstance(item, MessageItem) else "response.reasoning_text.done",
                item_id=item.id,
                output_index=index,
                text=part.text,
                logprobs=part.logprobs if isinstance(part, OutputText) else [],
                sequence_number=self._next(),
            )
            yield PartEvent(
                type="response.content_part.done",
                item_id=item.id,
                output_index=index,
                part=part,
                sequence_number=self._next(),
            )
        yield ItemEvent(type="response.output_item.done", output_index=index, item=item, sequence_number=self._next())


def _ending(part: CompletionOutput) -> _Ending:
    return "completed" if part.finish_reason == "stop" else "incomplete"


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    return [
        Endpoint(
            "POST",
            "/v1/responses",
            Responses(context).create,
            "Answers an input",
            body=ResponsesRequest,
            answer=ResponsesAnswer,
            events=get_args(ResponsesEvent),
        )
    ]
