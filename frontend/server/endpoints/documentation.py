"""`/openapi.json` and `/docs`."""

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import JSON_TYPE
from folovllm.frontend.server.openapi import docs_page, openapi_document


class Documentation:
    """What the server can do; made when it is first asked for."""

    def __init__(self, context: ServerContext, endpoints: Sequence[Endpoint]) -> None:
        self._context = context
        self._endpoints = endpoints
        self._document = b""
        self._page = ""

    async def document(self, _request: Request) -> Response:
        self._make()
        return Response(self._document, media_type=JSON_TYPE)

    async def page(self, _request: Request) -> Response:
        self._make()
        return HTMLResponse(self._page)

    def _make(self) -> None:
        if self._document:
            return
        options = self._context.options
        document = openapi_document(self._endpoints, with_keys=bool(options.api_keys), root_path=options.root_path)
        self._document = msgspec.json.encode(document)
        self._page = docs_page(document)


def documentation(endpoints: Sequence[Endpoint], context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module; they describe `endpoints`."""
    made = Documentation(context, endpoints)
    return [
        Endpoint("GET", "/openapi.json", made.document, "The OpenAPI document"),
        Endpoint("GET", "/docs", made.page, "The same for people"),
    ]
