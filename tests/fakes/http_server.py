"""The application in this process, over a fake core or a daemon: no socket, the client's ASGI transport."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.types import Message, Scope

from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.app import build_app
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.options import ServerOptions

TIMEOUT_S = 60.0
BASE_URL = "http://test"


class Served:
    """An application and a client of it.

    Attributes:
        app: the application.
        llm: its engine.
        http: a client without a key.
    """

    def __init__(self, app: Starlette, llm: AsyncLLM, http: httpx.AsyncClient) -> None:
        self.app = app
        self.llm = llm
        self.http = http

    @property
    def context(self) -> ServerContext:
        context = self.app.state.context
        assert isinstance(context, ServerContext)
        return context

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Posts JSON; an answer, whatever its status."""
        return await self.http.post(path, json=body, headers=headers)

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, decoded; the last one is checked to be [DONE] and left out."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        events = data_of(answer.text)
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


def data_of(text: str) -> list[str]:
    """The data of server-sent events; comments and names of events are passed over."""
    return [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]


class Visit:
    """One HTTP request spoken in ASGI by hand, for a test that decides when the client reads, and when it goes away.

    Attributes:
        messages: what the application sent.
        reads: while cleared, sending blocks: the client does not read.
    """

    def __init__(
        self, app: Starlette, path: str, body: Any, *, on_send: Callable[[Message], None] = lambda _: None
    ) -> None:
        """`on_send` is called with each message before the client has it."""
        self._on_send = on_send
        self.messages: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._changed = asyncio.Condition()
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("test", 1),
            "server": ("test", 80),
            "scheme": "http",
            "http_version": "1.1",
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self._on_send(message)
        async with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    async def sent(self, count: int) -> None:
        """Waits, bounded, until the application has sent so many messages."""
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(lambda: len(self.messages) >= count)

    def hang_up(self) -> None:
        """The client goes away."""
        self._gone.set()

    @property
    def status(self) -> int:
        assert isinstance(self.messages[0]["status"], int)
        return self.messages[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages[1:]).decode()


@asynccontextmanager
async def served(endpoint: str, **options: Any) -> AsyncIterator[Served]:
    """An application for the engine at `endpoint`."""
    async with AsyncLLM(engine=endpoint) as llm:
        app = build_app(llm, ServerOptions(**({"served_model_names": ("tiny",)} | options)))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=TIMEOUT_S) as http:
            yield Served(app, llm, http)


def run(endpoint: str, scenario: Callable[[Served], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Runs a scenario against an application, within a bound."""

    async def bounded() -> None:
        async with served(endpoint, **options) as server:
            await asyncio.wait_for(scenario(server), TIMEOUT_S)

    asyncio.run(bounded())
