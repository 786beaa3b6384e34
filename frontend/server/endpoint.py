"""One endpoint: its route and what the OpenAPI document says of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A method on a path.

    Attributes:
        method, path: what is asked for.
        handler: answers; may raise ApiError and FoloVLLMError.
        summary: one line for the documentation.
        body: Struct of the request's body, None for none.
        answer: Struct of the answer, None for one that is no JSON.
        events: Structs that the events of its stream hold; none where it does not stream.
        errors: statuses of its errors and what they hold, besides those of every endpoint with a body (`openapi`).
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    events: tuple[type[msgspec.Struct], ...] = ()
    errors: tuple[tuple[int, type[msgspec.Struct]], ...] = ()
