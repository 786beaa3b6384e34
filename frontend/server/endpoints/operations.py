"""Health, version and metrics."""

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import folovllm
from folovllm.common.errors import EngineError
from folovllm.common.messages.frontend_core import EngineStats
from folovllm.frontend.server.context import ServerContext, json_response
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.protocol.models import HealthAnswer, VersionAnswer


class Operations:
    """What operators and load balancers ask."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def health(self, _request: Request) -> Response:
        """200 after a round trip through the engine; 503 if it is dead, has no worker, or does not answer in time."""
        _, answer = await self._ask()
        return json_response(answer, 200 if answer.status == "ready" else 503)

    async def ready(self, _request: Request) -> Response:
        """As `health`, and 503 from the moment on at which the server is asked to end."""
        if self._context.draining:
            return json_response(HealthAnswer(status="draining", message="this server is shutting down"), 503)
        return await self.health(_request)

    async def version(self, _request: Request) -> Response:
        return json_response(VersionAnswer(version=folovllm.__version__))

    async def metrics(self, _request: Request) -> Response:
        """The engine's own numbers are left out where it does not answer in time."""
        stats, _ = await self._ask()
        return Response(self._context.metrics.text(stats), media_type=CONTENT_TYPE_LATEST)

    async def _ask(self) -> tuple[EngineStats | None, HealthAnswer]:
        bound_s = self._context.options.health_timeout_s
        try:
            async with asyncio.timeout(bound_s):
                stats = await self._context.llm.get_stats()
        except TimeoutError:
            return None, HealthAnswer(status="stuck", message=f"the engine did not answer within {bound_s:g} s")
        except EngineError as error:
            return None, HealthAnswer(status="dead", message=str(error))
        if self._context.stuck:
            return stats, HealthAnswer(status="stuck", message=self._context.stuck)
        if stats.is_recovering:
            message = "the engine's worker has ended and the next one is being started; requests wait for it"
            return stats, HealthAnswer(status="recovering", message=message)
        return stats, HealthAnswer(status="ready")


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    operations = Operations(context)
    return [
        Endpoint(
            "GET",
            "/health",
            operations.health,
            "Whether the engine answers",
            answer=HealthAnswer,
            errors=((503, HealthAnswer),),
        ),
        Endpoint(
            "GET",
            "/ready",
            operations.ready,
            "Whether new requests are taken",
            answer=HealthAnswer,
            errors=((503, HealthAnswer),),
        ),
        Endpoint("GET", "/version", operations.version, "The version", answer=VersionAnswer),
        Endpoint("GET", "/metrics", operations.metrics, "Numbers for Prometheus"),
    ]
