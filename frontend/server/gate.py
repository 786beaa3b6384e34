"""What every HTTP request passes first: its id, the API key, the log line, the count of statuses.

Keys are asked for on every path but those of `OPEN_PATHS`, whether or not a route is there: deny by default, so that a
route that is added tomorrow is guarded.
"""

import hmac
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from folovllm.common.log import get_logger
from folovllm.frontend.server.errors import ApiError, error_response
from folovllm.frontend.server.metrics import ServerMetrics
from folovllm.frontend.server.page_files import PAGE_PATHS

logger = get_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", *PAGE_PATHS})  # the page is the same for everybody, and asks for a key

_USABLE_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII: nothing that breaks a log line or a header


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], access_log: bool, metrics: ServerMetrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._access_log = access_log
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = _Visit(send, _request_id(headers), lambda status: self._metrics.count_http(scope["method"], status))
        scope.setdefault("state", {})["request_id"] = visit.request_id
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if self._keys and path not in OPEN_PATHS and not self._is_known(headers):
                message = "a valid API key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY"
                refusal = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error_response(refusal, path)(scope, receive, visit.send)
            else:
                await self._app(scope, receive, visit.send)
        finally:
            visit.ended()
            if self._access_log:
                _log(scope, path, visit)

    def _is_known(self, headers: Headers) -> bool:
        """Compares with all keys, whichever fits, so that the time taken tells nothing."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return sum(hmac.compare_digest(given.encode("latin-1", "replace"), key) for key in self._keys) > 0


class _Visit:
    """One HTTP request on its way: what was sent so far.

    It is counted before its last byte is sent: who has the whole answer finds it in `/metrics`, whichever process of
    several is asked. One that never comes so far is counted when it has ended.
    """

    def __init__(self, send: Send, request_id: str, count: Callable[[int], None]) -> None:
        self._send = send
        self._count = count
        self._is_counted = False
        self.request_id = request_id
        self.status = 0
        self.num_bytes = 0
        self.began = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.request_id
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.ended()
        await self._send(message)

    def ended(self) -> None:
        """Counts it, once."""
        if not self._is_counted:
            self._is_counted = True
            self._count(self.status)


def _log(scope: Scope, path: str, visit: _Visit) -> None:
    logger.info(
        '%s "%s %s" %s %d B %.3f s %s',
        scope["client"][0] if scope.get("client") else "-",
        scope["method"],
        path.encode("unicode_escape").decode("ascii")[:200],
        visit.status or "no answer",
        visit.num_bytes,
        time.monotonic() - visit.began,
        visit.request_id,
    )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex
