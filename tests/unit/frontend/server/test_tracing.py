"""Spans: what is in them, whose trace they belong to, what refused and broken-off requests leave, and where they go."""

import asyncio
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from folovllm.common.errors import ConfigError
from folovllm.common.messages.frontend_core import RejectedRequest
from folovllm.frontend.server.options import ServerOptions
from folovllm.frontend.server.spans import need_libraries, spans_to
from folovllm.frontend.server.tracing import OpenTelemetrySpans
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, Visit, run
from tests.fakes.trace_collector import Collector

Script = Callable[[str], FakeCore]
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def recorded(server: Served) -> InMemorySpanExporter:
    """Has the server record its requests in memory."""
    exporter = InMemorySpanExporter()
    server.context.spans = OpenTelemetrySpans(exporter, at_once=True)
    return exporter


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_chat_is_a_span_of_its_clients_trace(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        exporter = recorded(server)
        body = HELLO | {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x", "y"], "n": 2}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "X-Request-Id": "r1"}
        assert (await server.post(CHAT, body, **headers)).status_code == 200
        (span,) = exporter.get_finished_spans()
        assert (span.name, span.kind) == ("chat tiny", SpanKind.SERVER)
        assert span.context is not None
        assert span.parent is not None
        assert f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == PARENT
        assert span.context.trace_state.get("a") == "b"
        assert span.status.status_code is StatusCode.UNSET
        told = attributes(span)
        times = {name: told.pop(name) for name in list(told) if name.startswith("gen_ai.latency.")}
        assert told == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "folovllm",
            "gen_ai.request.model": "tiny",
            "gen_ai.request.id": "r1",
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.seed": 3,
            "gen_ai.request.frequency_penalty": 0.0,
            "gen_ai.request.presence_penalty": 0.0,
            "gen_ai.output.type": "text",
            "gen_ai.response.id": "r1",
            "gen_ai.response.model": "tiny",
            "gen_ai.response.finish_reasons": ("stop", "stop"),
            "gen_ai.usage.input_tokens": told["gen_ai.usage.input_tokens"],
            "gen_ai.usage.output_tokens": 2 * len("ab") + 2,
            "gen_ai.usage.cache_read.input_tokens": 3,
        }
        assert set(times) == {
            *("gen_ai.latency.time_in_queue", "gen_ai.latency.time_to_first_token", "gen_ai.latency.e2e"),
            *("gen_ai.latency.time_in_model_prefill", "gen_ai.latency.time_in_model_decode"),
            "gen_ai.latency.time_in_model_inference",
        }
        assert times["gen_ai.latency.time_in_queue"] == 0.25  # what the fake core says
        assert all(value >= 0 for value in times.values())

    run(saying("ab").endpoint, scenario)


def test_every_api_has_its_spans_streamed_or_not(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        exporter = recorded(server)
        bodies: dict[str, dict[str, Any]] = {
            CHAT: HELLO | {"response_format": {"type": "json_object"}},
            "/v1/completions": {"prompt": ["a", "b"]},
            "/v1/responses": {"input": "hi"},
            "/v1/messages": HELLO | {"max_tokens": 5},
        }
        for path, body in bodies.items():
            for stream in (False, True):
                exporter.clear()
                assert (await server.post(path, body | {"stream": stream})).status_code == 200
                spans = exporter.get_finished_spans()
                assert len(spans) == (2 if path == "/v1/completions" else 1)
                for span in spans:
                    told = attributes(span)
                    operation = "text_completion" if path == "/v1/completions" else "chat"
                    assert span.name == f"{operation} tiny"
                    assert told["gen_ai.response.finish_reasons"] in (("stop",), ("length",))
                    assert told["gen_ai.output.type"] == ("json" if path == CHAT else "text")
                    assert span.parent is None

    run(saying("ab").endpoint, scenario)


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_header_that_is_none_begins_a_new_trace(saying: Script, header: str) -> None:
    async def scenario(server: Served) -> None:
        exporter = recorded(server)
        assert (await server.post(CHAT, HELLO, traceparent=header)).status_code == 200
        (span,) = exporter.get_finished_spans()
        assert span.parent is None

    run(saying("ab").endpoint, scenario)


def test_refused_and_failed_requests_say_so(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        exporter = recorded(server)
        core.reject = lambda request: RejectedRequest(request.number, "queue_full", "no room", retry_after_s=1.0)
        assert (await server.post(CHAT, HELLO)).status_code == 503
        (span,) = exporter.get_finished_spans()
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None, "an error's text may quote the user's"
        assert "no room" not in span.to_json()
        assert attributes(span)["error.type"] == "QueueFullError"
        assert "gen_ai.usage.input_tokens" not in attributes(span)
        exporter.clear()
        assert (await server.post(CHAT, HELLO | {"unknown": 1})).status_code == 400
        assert exporter.get_finished_spans() == (), "nothing went to the engine"

    run(core.endpoint, scenario)


def test_a_stream_that_its_client_breaks_off_has_ended(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        exporter = recorded(server)
        visit = Visit(server.app, CHAT, HELLO | {"stream": True})
        await visit.sent(2)
        visit.hang_up()
        await visit.task
        (span,) = exporter.get_finished_spans()
        assert span.end_time is not None
        assert "gen_ai.response.finish_reasons" not in attributes(span)

    run(endless.endpoint, scenario)


def test_no_span_without_the_option(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        assert server.context.spans is None
        assert (await server.post(CHAT, HELLO)).status_code == 200

    run(saying("ab").endpoint, scenario)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_spans_go_to_the_collector_before_the_server_ends(saying: Script, collector: Collector) -> None:
    core = saying("ab")

    async def scenario(server: Served) -> None:
        assert (await server.post(CHAT, HELLO)).status_code == 200
        assert server.context.spans is not None
        await asyncio.to_thread(server.context.spans.close)

    run(core.endpoint, scenario, otlp_traces_endpoint=collector.url)
    ((path, body),) = collector.bodies
    assert path == "/v1/traces"
    (of_resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert ("service.name", "folovllm") in [(a.key, a.value.string_value) for a in of_resource.resource.attributes]
    assert collector.span_names() == ["chat tiny"]


def test_a_collector_that_is_gone_holds_no_end_up(saying: Script, collector: Collector) -> None:
    core = saying("ab")
    collector.stop_listening()

    async def scenario(server: Served) -> None:
        assert (await server.post(CHAT, HELLO)).status_code == 200
        assert server.context.spans is not None
        await asyncio.to_thread(server.context.spans.close)  # within the bound that `run` puts on each scenario

    run(core.endpoint, scenario, otlp_traces_endpoint=collector.url)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    for call in (need_libraries, lambda: spans_to("http://127.0.0.1:4318/v1/traces")):
        with pytest.raises(ConfigError, match=r"spans need the extra otel .*pip install 'folovllm\[otel\]'"):
            call()


def test_the_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint='127.0.0.1:4318' must be a URL such as http://"):
        ServerOptions(otlp_traces_endpoint="127.0.0.1:4318")


def test_only_one_module_knows_the_library() -> None:
    from tests.sources import ROOT

    users = [
        path.name
        for path in pathlib.Path(ROOT / "frontend").rglob("*.py")
        if "from opentelemetry" in path.read_text(encoding="utf-8")
    ]
    assert sorted(users) == ["spans.py", "tracing.py"]
