"""An HTTP server in a thread that answers by a script, for the tests of clients: any status, any bytes."""

import json
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

Body = dict[str, Any]


class Asked(NamedTuple):
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: Body


class Answer(NamedTuple):
    """What is answered: the parts of a body, each sent as a chunk as soon as it is made."""

    parts: Iterable[bytes]
    status: int = 200
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer([json.dumps(value).encode()], status, headers=tuple(headers.items()))


def models(*names: str) -> Answer:
    return as_json({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def events(*data: Any) -> Answer:
    """A stream: of objects, and of texts as they are."""
    texts = [item if isinstance(item, str) else json.dumps(item) for item in data]
    return Answer([f"data: {text}\n\n".encode() for text in texts], kind="text/event-stream")


def chat_events(*texts: str, reason: str = "stop", tokens: int | None = None) -> Answer:
    """A chat's answer in so many pieces, its usage and its end."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts) if tokens is None else tokens}
    return events(*chunks, {"choices": [], "usage": usage}, "[DONE]")


class _Server(ThreadingHTTPServer):
    """Says nothing about clients that hang up."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class ScriptedServer:
    """Serves until the end of a `with` block.

    Attributes:
        url: where.
        asked: all requests that came.
    """

    def __init__(self, script: Callable[[Asked], Answer]) -> None:
        asked: list[Asked] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Asked(self.path, dict(self.headers.items()), json.loads(data) if data else {})
                asked.append(request)
                answer = script(request)
                self.send_response(answer.status)
                for name, value in (("Content-Type", answer.kind), *answer.headers):
                    self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    for part in answer.parts:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                        self.wfile.flush()
                    self.wfile.write(b"0\r\n\r\n")
                except ConnectionError:
                    self.close_connection = True

            do_GET = do_POST = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.asked = asked
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="scripted-server")
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
