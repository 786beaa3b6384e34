"""A collector of OpenTelemetry spans, in a thread."""

import http.server
import threading
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Takes spans over HTTP, on a port of its own.

    Attributes:
        url: where it listens.
        bodies: (path, body) of all that came.
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                outer.bodies.append((self.path, self.rfile.read(size)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def span_names(self) -> list[str]:
        """Of all spans that came."""
        requests = [ExportTraceServiceRequest.FromString(body) for _, body in self.bodies]
        scopes = [scope for request in requests for of in request.resource_spans for scope in of.scope_spans]
        return [span.name for scope in scopes for span in scope.spans]

    def stop_listening(self) -> None:
        """Nobody answers at `url` from now on."""
        self._server.server_close()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
