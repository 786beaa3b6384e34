"""What the endpoints of one server share."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from folovllm.common.errors import RequestError
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.bodies import BodyReader
from folovllm.frontend.server.errors import JSON_TYPE, ApiError, unavailable
from folovllm.frontend.server.metrics import ServerMetrics
from folovllm.frontend.server.options import ServerOptions
from folovllm.frontend.server.parsers.registry import choose_reasoning_format, choose_tool_format
from folovllm.frontend.server.spans import spans_to
from folovllm.frontend.tokenizer import Tokenizer

Kind = TypeVar("Kind", bound=msgspec.Struct)

_RETRY_S = 5.0


class ServerContext:
    """The engine and what was chosen at the start.

    Attributes:
        llm: the engine.
        options: of the server.
        metrics: what `/metrics` shows.
        model_names: names that requests may ask for; the first one is told in answers.
        created: when the server was made, seconds since the epoch.
        tokenizer: None where the model has none.
        chat_template: its source, "" where the model has none.
        tool_format, reasoning_format: how the model writes tool calls and thoughts; None: it does not.
        spans: where requests are recorded; None: nowhere.
        draining: new requests are refused; those in work go on.
        stuck: why the engine gets no new requests (`heartbeat`); "" as a rule.
    """

    def __init__(self, llm: AsyncLLM, options: ServerOptions) -> None:
        """Raises ConfigError: there is no parser of that name, or the libraries of spans are not installed."""
        self.llm = llm
        self.options = options
        self.model_names = options.served_model_names or (Path(llm.info.model).name,)
        self.metrics = ServerMetrics(self.model_names[0], in_several_processes=options.api_server_count > 1)
        self.spans = spans_to(options.otlp_traces_endpoint) if options.otlp_traces_endpoint else None
        self.created = int(time.time())
        self.draining = False
        self.stuck = ""
        self._active: Counter[str] = Counter()
        self.tokenizer = _tokenizer_of(llm)
        self.chat_template = (self.tokenizer.chat_template if self.tokenizer else None) or ""
        self.tool_format = choose_tool_format(options.tool_parser, self.chat_template)
        self.reasoning_format = choose_reasoning_format(options.reasoning_parser, self.chat_template)

    def reader(self, kind: type[Kind]) -> BodyReader[Kind]:
        """What reads bodies of a kind, within this server's bounds."""
        return BodyReader(kind, max_bytes=int(self.options.max_body_mb * 2**20), lenient=self.options.lenient)

    def check_open(self) -> None:
        """Raises ApiError 503 where the server takes no more requests."""
        if self.draining:
            raise unavailable("this server is shutting down", "draining", _RETRY_S)
        if self.stuck:
            raise unavailable(self.stuck, "engine_stuck", _RETRY_S)

    def begin(self, request_id: str) -> None:
        """A request goes to the engine under this id; several may have the same."""
        self._active[request_id] += 1

    def end(self, request_id: str) -> None:
        """One request of this id has ended."""
        self._active[request_id] -= 1
        if not self._active[request_id]:
            del self._active[request_id]

    @property
    def num_active(self) -> int:
        """Requests that the engine has from this server."""
        return self._active.total()

    async def abort_all(self) -> None:
        """Ends all requests in work; their answers end with finish_reason "abort"."""
        for request_id, count in list(self._active.items()):
            for _ in range(count):
                await self.llm.abort(request_id)

    def check_model(self, name: str | None) -> str:
        """The name that the answer tells. Raises ApiError 404 for a model that is not served here."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            shown = ", ".join(self.model_names)
            raise ApiError(
                404, f"model {name[:200]!r} is not served here, but {shown}", param="model", code="model_not_found"
            )
        return name

    def need_tokenizer(self) -> Tokenizer:
        """Raises RequestError where the model has none."""
        return self.llm.get_tokenizer()


def _tokenizer_of(llm: AsyncLLM) -> Tokenizer | None:
    try:
        return llm.get_tokenizer()
    except RequestError:
        return None


def request_id_of(request: Request) -> str:
    """The id of the HTTP request: the client's `X-Request-Id`, or one of our own (`gate`)."""
    return str(request.scope["state"]["request_id"])


def json_response(answer: msgspec.Struct, status: int = 200, ignored: Sequence[str] = ()) -> Response:
    """An answer as JSON; `ignored` are the fields that were passed over."""
    return Response(msgspec.json.encode(answer), status, ignored_header(ignored), media_type=JSON_TYPE)


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that lists fields that were passed over."""
    if not ignored:
        return {}
    return {"X-Ignored-Fields": ", ".join(name.encode("unicode_escape").decode("ascii") for name in ignored)}
