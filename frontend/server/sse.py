"""Server-sent events: a response that is written as it comes, and stops when the client goes away.

Up to the first event nothing is sent, so that an error before it is an HTTP error of its own. An engine that takes
longer than the keep-alive time gets a comment sent, and with it the headers; an error is then an event.

One task writes, and waits where the client does not read, so that what comes meanwhile is merged by whoever makes the
events. A second one waits for the client's end, a third for silence.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from folovllm.common.errors import FoloVLLMError
from folovllm.common.log import get_logger
from folovllm.frontend.server.errors import ApiError, error_body, error_response, to_api_error

logger = get_logger(__name__)
Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_UNBUFFERED = (b"x-accel-buffering", b"no")  # nginx would hold events back


def encode_event(data: msgspec.Struct) -> bytes:
    """One event without a name."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def encode_named_event(name: str, data: msgspec.Struct) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """An error behind the first event, in OpenAI's form; nothing comes after it."""
    return b"data: " + error_body(error, "") + b"\n\n"


class EventStream(Response):
    """A stream of encoded events."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float,
        error_event: Callable[[ApiError], bytes],
        headers: Mapping[str, str],
    ) -> None:
        """Args:
        events: each one encoded, with its empty line; closed when the stream ends, whatever ends it.
        keep_alive_s: seconds of silence after which a comment is sent; 0 sends none.
        error_event: the event that tells of an error behind the first event.
        headers: besides those of any such stream.
        """
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._error_event = error_event
        self._more_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._started = False
        self._last_sent = time.monotonic()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(scope, receive, send))
        tasks: list[asyncio.Future[None]] = [writer, asyncio.ensure_future(_disconnected(receive))]
        beat = asyncio.ensure_future(self._beat(send)) if self._keep_alive_s else None
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end([*tasks, *([beat] if beat else [])])
        if not writer.cancelled():
            writer.result()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, event)
            await self._send(send, b"", last=True)
        except (ApiError, FoloVLLMError) as error:
            await self._refuse(to_api_error(error), scope, receive, send)
        except Exception as error:
            logger.exception("an error that nobody foresaw, in a stream")
            await self._refuse(to_api_error(error), scope, receive, send)

    async def _refuse(self, refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            logger.warning("a stream ended with an error: %s", refusal)
            await self._send(send, self._error_event(refusal), last=True)
        else:
            self._started = True
            await error_response(refusal, scope["path"])(scope, receive, send)

    async def _send(self, send: Send, data: bytes, last: bool = False) -> None:
        if not self._started:
            self._started = True
            headers = [*_HEADERS, _UNBUFFERED, *self._more_headers]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": not last})

    async def _beat(self, send: Send) -> None:
        """Sends a comment whenever nothing was sent for long."""
        while True:
            silent_s = time.monotonic() - self._last_sent
            if silent_s >= self._keep_alive_s:
                await self._send(send, _KEEP_ALIVE)
                silent_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silent_s)


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client goes away. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
    finally:
        await _end([task, watch])
    return task.result()


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read by then."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: list[Any]) -> None:
    """Cancels what is left, and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
