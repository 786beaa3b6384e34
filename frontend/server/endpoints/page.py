"""The page at `/`. It needs no key to be loaded; what it asks the API for does."""

from starlette.requests import Request
from starlette.responses import Response

from folovllm.frontend.server.endpoint import Endpoint, Handler
from folovllm.frontend.server.page_files import PAGE_PATHS, read_page_file

_HEADERS = {
    "Cache-Control": "no-cache",  # another version of the server has another page
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def endpoints() -> list[Endpoint]:
    """The endpoints of this module, one for each file."""
    return [Endpoint("GET", path, _giving(name), "The page") for path, name in PAGE_PATHS.items()]


def _giving(name: str) -> Handler:
    content, media_type = read_page_file(name)

    async def give(_request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return give
