"""Makes the application: `build_app(llm, options)`.

The application owns nothing: whoever made the AsyncLLM closes it. `app.state.context` is the ServerContext.
"""

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from folovllm.common.errors import FoloVLLMError
from folovllm.common.log import get_logger
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.context import ServerContext, request_id_of
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.endpoints import (
    chat,
    completions,
    inspector,
    messages,
    models,
    operations,
    page,
    responses,
)
from folovllm.frontend.server.endpoints.documentation import documentation
from folovllm.frontend.server.errors import ApiError, error_response, to_api_error
from folovllm.frontend.server.gate import Gate
from folovllm.frontend.server.options import ServerOptions

logger = get_logger(__name__)

_CLIENT_LEFT = 499  # nginx's number; nobody reads it but the log line and the metrics
ENDPOINT_MODULES = (operations, models, chat, completions, messages, responses, inspector)


def build_app(llm: AsyncLLM, options: ServerOptions, *, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The server of one engine.

    Args:
        llm: the engine; requests must come from the event loop that uses it.
        options: of the server.
        more_routes: pages beside the API; they are guarded by the API keys like everything else.

    Raises:
        ConfigError: an option names a parser that does not exist.
    """
    context = ServerContext(llm, options)
    endpoints = [endpoint for module in ENDPOINT_MODULES for endpoint in module.endpoints(context)]
    endpoints += [*documentation(endpoints, context), *page.endpoints()]
    app = Starlette(
        routes=[*map(_route, endpoints), *more_routes],
        middleware=_middleware(context),
        exception_handlers={HTTPException: _http_exception},
    )
    app.state.context = context
    return app


def _middleware(context: ServerContext) -> list[Middleware]:
    options = context.options
    gate = Middleware(Gate, api_keys=options.api_keys, access_log=options.access_log, metrics=context.metrics)
    if not options.cors_origins:
        return [gate]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "X-Ignored-Fields", "Retry-After"],
    )
    return [cors, gate]


def _route(endpoint: Endpoint) -> Route:
    return Route(endpoint.path, _answering_errors(endpoint.handler), methods=[endpoint.method])


def _answering_errors(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, with errors turned into answers; one that was not raised on purpose is logged in full."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (ApiError, FoloVLLMError) as error:
            return error_response(to_api_error(error), request.scope["path"])
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            logger.exception("an error that nobody foresaw, in the answer to %s", request_id_of(request))
            return error_response(to_api_error(error), request.scope["path"])

    return answer


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path", 405: "this path does not take that method"}.get(
        error.status_code, error.detail
    )
    refusal = ApiError(error.status_code, message, headers=error.headers)
    return error_response(refusal, request.scope["path"])
