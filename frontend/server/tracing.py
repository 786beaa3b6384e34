"""OpenTelemetry spans, one for each request that the engine answers. Needs the extra `otel`.

Names of attributes follow the semantic conventions for generative AI; those of times, which these do not have, follow
vLLM's. A `traceparent` header makes the span a part of the client's trace. Nothing that a user wrote or read is in a
span: no prompt, no answer, no stop sequences, and of an error its type alone, as its text may quote these. A body with
several prompts has a span for each; thoughts that were bounded and the answer behind them are two.

This is the only module that knows the library, and nothing imports it unless spans are asked for.
"""

from collections.abc import Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import folovllm
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.outputs import RequestMetrics, RequestOutput
from folovllm.frontend.server.spans import SpanOrigin, Spans

_PROVIDER = "folovllm"


class OpenTelemetrySpans(Spans):
    """Makes spans and hands them to an exporter, in the background."""

    def __init__(self, exporter: SpanExporter, *, at_once: bool = False) -> None:
        """at_once: a span is exported when it ends, before anything else happens."""
        resource = Resource.create({"service.name": _PROVIDER, "service.version": folovllm.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor((SimpleSpanProcessor if at_once else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("folovllm.server", folovllm.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, origin: SpanOrigin, request_id: str, params: SamplingParams) -> "OpenTelemetrySpan":
        span = self._tracer.start_span(
            f"{origin.operation} {origin.model}",
            context=self._propagator.extract(dict(origin.headers)),
            kind=SpanKind.SERVER,
            attributes=_asked(origin, request_id, params),
        )
        return OpenTelemetrySpan(span, origin.model)

    def close(self) -> None:
        self._provider.shutdown()


class OpenTelemetrySpan:
    """The span of one request."""

    def __init__(self, span: Span, model: str) -> None:
        self._span = span
        self._model = model

    def ended(self, output: RequestOutput, finish_reasons: Sequence[str]) -> None:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.response.id": output.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": tuple(finish_reasons),
            "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        }
        if output.num_cached_tokens is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = output.num_cached_tokens
        if output.metrics is not None:
            attributes |= _times(output.metrics)
        self._span.set_attributes(attributes)

    def failed(self, error: Exception) -> None:
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        self._span.end()


def _asked(origin: SpanOrigin, request_id: str, params: SamplingParams) -> dict[str, AttributeValue]:
    """What the request asks for; what it leaves open is left out."""
    wanted = params.structured_outputs
    values: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": origin.operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": origin.model,
        "gen_ai.request.id": request_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.output.type": "json" if wanted is not None and (wanted.json or wanted.json_object) else "text",
    }
    return {name: value for name, value in values.items() if value is not None}


def _times(metrics: RequestMetrics) -> dict[str, AttributeValue]:
    """Seconds, where they are known."""
    scheduled, first, end = metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time
    known: dict[str, float | None] = {
        "gen_ai.usage.output_tokens": metrics.num_generation_tokens,
        "gen_ai.latency.time_in_queue": metrics.time_in_queue,
        "gen_ai.latency.time_to_first_token": metrics.time_to_first_token,
        "gen_ai.latency.e2e": metrics.total_time,
        "gen_ai.latency.time_in_model_prefill": _between(scheduled, first),
        "gen_ai.latency.time_in_model_decode": _between(first, end),
        "gen_ai.latency.time_in_model_inference": _between(scheduled, end),
    }
    return {name: value for name, value in known.items() if value is not None}


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)
