"""Lines of OpenAI's batch files."""

from typing import Any

import msgspec


class BatchLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of the input.

    Attributes:
        custom_id: the caller's name for it; stands in the output.
        method: POST.
        url: the endpoint: /v1/chat/completions or /v1/completions.
        body: of the request, as the endpoint takes it.
    """

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class BatchResponse(msgspec.Struct, kw_only=True):
    """What the endpoint would have answered.

    Attributes:
        status_code: 200, or that of an error.
        request_id: its name in the logs.
        body: the answer, or `{"error": …}`.
    """

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, kw_only=True):
    """Why a line is no request.

    Attributes:
        code: invalid_json_line, invalid_method or invalid_url.
        message: for people; begins with the line's number.
    """

    code: str
    message: str


class BatchOutput(msgspec.Struct, kw_only=True):
    """A line of the output; either `response` or `error` is null.

    Attributes:
        id: made here.
        custom_id: of the input's line; null where it could not be read.
        response: to what is a request.
        error: of what is none.
    """

    id: str
    custom_id: Any
    response: BatchResponse | None = None
    error: BatchError | None = None
