"""The seam between the server and whatever records its requests: a span begins, ends or fails, and is closed.

Knows no library, so that a server without `--otlp-traces-endpoint` needs none (`tracing` is what needs one).
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from starlette.requests import Request

from folovllm.common.errors import ConfigError
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.outputs import RequestOutput

_HEADERS = ("traceparent", "tracestate")
_EXPORT_BOUND_S = 2.0  # of one batch, tries again included: a collector that is gone must not hold up the server's end


@dataclass(frozen=True, slots=True)
class SpanOrigin:
    """Where a request comes from.

    Attributes:
        operation: what is done, in the words of OpenTelemetry's conventions.
        model: the name that was asked for.
        headers: those of the W3C trace context that came with it.
    """

    operation: Literal["chat", "text_completion"]
    model: str
    headers: Mapping[str, str]


class OpenSpan(Protocol):
    """The record of one request that is in work."""

    def ended(self, output: RequestOutput, finish_reasons: Sequence[str]) -> None:
        """The request was answered: its last output."""

    def failed(self, error: Exception) -> None:
        """It was refused, or failed."""

    def close(self) -> None:
        """Nothing more comes; one that neither ended nor failed was given up by its client."""


class Spans(Protocol):
    """Makes the records."""

    def begin(self, origin: SpanOrigin, request_id: str, params: SamplingParams) -> OpenSpan:
        """A request goes to the engine."""

    def close(self) -> None:
        """Writes out what is left, within a bound."""


def trace_headers(request: Request) -> dict[str, str]:
    """The headers of the W3C trace context that an HTTP request has."""
    return {name: value for name in _HEADERS if (value := request.headers.get(name)) is not None}


def need_libraries() -> None:
    """Raises ConfigError where the extra `otel` is not installed."""
    try:
        importlib.import_module("opentelemetry.sdk.trace")
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigError(
            f"spans need the extra otel ({error}): pip install 'folovllm[otel]', or pip install -e '.[otel]' in "
            "a checkout"
        ) from error


def spans_to(endpoint: str) -> Spans:
    """Spans that go to a collector by OTLP over HTTP. Raises ConfigError as `need_libraries`."""
    need_libraries()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from folovllm.frontend.server.tracing import OpenTelemetrySpans

    return OpenTelemetrySpans(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_BOUND_S))
