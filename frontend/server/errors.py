"""Errors as HTTP answers, in OpenAI's form, or in Anthropic's for its own endpoints.

| what happened | status | type |
|---|---|---|
| the body, a field, or the prompt's length is wrong | 400 | invalid_request_error |
| no key, or a wrong one | 401 | authentication_error |
| no such path, or no such model | 404 | not_found_error |
| the body is too large | 413 | request_too_large |
| the request failed within the engine | 500 | api_error |
| the queue is full, the server drains, the engine is gone | 503 | overloaded_error, with `Retry-After` where it helps |
"""

import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from folovllm.common.errors import EngineError, FoloVLLMError, QueueFullError, RequestError
from folovllm.frontend.server.protocol.common import ErrorAnswer, ErrorBody
from folovllm.frontend.server.protocol.messages import MessagesError, MessagesErrorAnswer

ANTHROPIC_PREFIX = "/v1/messages"
JSON_TYPE = "application/json"
_MAX_MESSAGE = 2000
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    500: "api_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """The type that bodies name."""
        return _TYPES.get(self.status, "api_error")


def unavailable(message: str, code: str, retry_after_s: float | None = None) -> ApiError:
    """A 503; `retry_after_s` says when another try may succeed."""
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(503, message, code=code, headers=headers)


def to_api_error(error: Exception) -> ApiError:
    """What an exception is to a client; one that is no error of ours tells nothing about its cause."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return unavailable(str(error), "queue_full", error.retry_after_s)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, EngineError):
        return unavailable(str(error), "engine_dead")
    if isinstance(error, FoloVLLMError):
        return ApiError(500, str(error), code="request_failed")
    return ApiError(500, "internal error; the server's log has the cause", code="internal_error")


def error_body(error: ApiError, path: str) -> bytes:
    """The JSON body, in the form that clients of `path` expect."""
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + " …"
    if path.startswith(ANTHROPIC_PREFIX):
        return msgspec.json.encode(MessagesErrorAnswer(error=MessagesError(type=error.kind, message=message)))
    return msgspec.json.encode(
        ErrorAnswer(error=ErrorBody(message=message, type=error.kind, param=error.param, code=error.code))
    )


def error_response(error: ApiError, path: str) -> Response:
    """The HTTP answer."""
    return Response(error_body(error, path), error.status, error.headers, media_type=JSON_TYPE)
