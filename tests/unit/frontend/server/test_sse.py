"""Streams of events: when headers go out, what an error becomes, silence, and clients that leave."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from folovllm.common.errors import EngineDeadError, RequestFailedError
from folovllm.frontend.server.errors import ApiError
from folovllm.frontend.server.sse import EventStream, error_event, unless_disconnected

_TIMEOUT_S = 30.0


class Client:
    """The other end of one response."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.changed = asyncio.Event()
        self.gone = asyncio.Event()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.changed.set()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def take(self, count: int) -> None:
        """Waits until so many messages were sent."""
        while len(self.sent) < count:
            self.changed.clear()
            await self.changed.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


class Source:
    """Events that come when the test says so."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


def run(scenario: Callable[[Client, Source], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(Client(), Source()), _TIMEOUT_S)

    asyncio.run(bounded())


def start(client: Client, source: Source, *, keep_alive_s: float = 0.0) -> "asyncio.Task[None]":
    stream = EventStream(
        source.events(), keep_alive_s=keep_alive_s, error_event=error_event, headers={"X-Ignored-Fields": "a"}
    )
    return asyncio.create_task(stream({"type": "http", "path": "/v1/completions"}, client.receive, client.send))


def test_nothing_is_sent_before_the_first_event() -> None:
    async def scenario(client: Client, source: Source) -> None:
        task = start(client, source)
        source.queue.put_nowait(b"data: 1\n\n")
        await client.take(2)
        headers = dict(client.sent[0]["headers"])
        assert client.sent[0]["status"] == 200
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"x-accel-buffering"] == b"no"
        assert headers[b"x-ignored-fields"] == b"a"
        source.queue.put_nowait(None)
        await task
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    run(scenario)


@pytest.mark.parametrize(
    "error, status",
    [(RequestFailedError("no"), 500), (EngineDeadError("gone"), 503), (ApiError(400, "bad", param="x"), 400)],
)
def test_L25_an_error_first_is_an_http_error(error: Exception, status: int) -> None:
    async def scenario(client: Client, source: Source) -> None:
        source.queue.put_nowait(error)
        await start(client, source)
        assert client.sent[0]["status"] == status
        assert str(error).encode() in client.body
        assert source.closed

    run(scenario)


def test_L25_an_error_later_is_the_last_event() -> None:
    async def scenario(client: Client, source: Source) -> None:
        source.queue.put_nowait(b"data: 1\n\n")
        source.queue.put_nowait(RequestFailedError("the step failed"))
        await start(client, source)
        assert client.body.startswith(b'data: 1\n\ndata: {"error":{"message":"the step failed"')
        assert client.sent[-1]["more_body"] is False
        assert b"[DONE]" not in client.body

    run(scenario)


@pytest.mark.parametrize("num_events", [0, 1])
def test_a_bug_is_logged_and_told_without_its_cause(num_events: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: Client, source: Source) -> None:
        for _ in range(num_events):
            source.queue.put_nowait(b"data: 1\n\n")
        source.queue.put_nowait(ZeroDivisionError("a secret"))
        await start(client, source)
        assert source.closed
        assert client.sent[0]["status"] == (200 if num_events else 500)
        assert b"internal_error" in client.body
        assert b"secret" not in client.body

    library = logging.getLogger("folovllm")
    before, library.propagate = library.propagate, True
    try:
        run(scenario)
    finally:
        library.propagate = before
    assert "a secret" in caplog.text


def test_silence_is_broken_by_comments() -> None:
    async def scenario(client: Client, source: Source) -> None:
        task = start(client, source, keep_alive_s=0.01)
        await client.take(4)
        assert client.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
        source.queue.put_nowait(RequestFailedError("too late for an HTTP error"))
        await task
        assert client.sent[0]["status"] == 200
        assert b'data: {"error"' in client.body
        assert [message["type"] for message in client.sent].count("http.response.start") == 1

    run(scenario)


def test_L22_a_client_that_leaves_closes_the_source() -> None:
    async def scenario(client: Client, source: Source) -> None:
        task = start(client, source, keep_alive_s=5.0)
        source.queue.put_nowait(b"data: 1\n\n")
        await client.take(2)
        client.gone.set()
        await task
        assert source.closed

    run(scenario)


def test_a_cancelled_response_closes_the_source_and_leaves_no_task() -> None:
    async def scenario(client: Client, source: Source) -> None:
        before = asyncio.all_tasks()
        task = start(client, source, keep_alive_s=5.0)
        source.queue.put_nowait(b"data: 1\n\n")
        await client.take(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gc.collect()
        assert source.closed
        assert asyncio.all_tasks() == before

    run(scenario)


def test_work_for_a_client_that_leaves_is_cancelled() -> None:
    async def scenario(client: Client, source: Source) -> None:
        before = asyncio.all_tasks()
        request = Request({"type": "http", "method": "POST", "headers": []}, client.receive)
        asyncio.get_running_loop().call_soon(client.gone.set)
        with pytest.raises(ClientDisconnect):
            await unless_disconnected(request, anext(source.events()))
        assert asyncio.all_tasks() == before

    run(scenario)


def test_work_gives_its_result_or_its_error() -> None:
    async def scenario(client: Client, source: Source) -> None:
        request = Request({"type": "http", "method": "POST", "headers": []}, client.receive)
        source.queue.put_nowait(b"x")
        assert await unless_disconnected(request, anext(source.events())) == b"x"
        source.queue.put_nowait(RequestFailedError("no"))
        with pytest.raises(RequestFailedError):
            await unless_disconnected(request, anext(source.events()))

    run(scenario)
