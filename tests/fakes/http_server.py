"""The application in this process, over a fake core or a daemon: no socket, the client's ASGI transport."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette

from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.app import build_app
from folovllm.frontend.server.options import ServerOptions

TIMEOUT_S = 30.0
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

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Posts JSON; an answer, whatever its status."""
        return await self.http.post(path, json=body, headers=headers)


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
