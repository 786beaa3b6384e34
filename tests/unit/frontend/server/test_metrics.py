"""What `/metrics` shows."""

import pathlib
import re

import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from folovllm.common.messages.frontend_core import EngineStats
from folovllm.frontend.outputs import RequestMetrics, RequestOutput
from folovllm.frontend.server.metrics import ENGINE_METRICS, PREFIX, REQUEST_METRICS, ServerMetrics
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, Visit, run

STATS = EngineStats(1, 3, 4, 25, 100, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)


def values(page: bytes) -> dict[str, float]:
    """Name with its labels but the model → value."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items() if name != "model_name")
            assert sample.labels["model_name"] == "tiny"
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def ended(**times: float) -> RequestOutput:
    metrics = RequestMetrics(arrival_time=10.0, num_generation_tokens=5)
    for name, value in times.items():
        setattr(metrics, name, value)
    return RequestOutput("r", None, [1, 2, 3], finished=True, metrics=metrics)


def test_a_request_from_arrival_to_end() -> None:
    metrics = ServerMetrics("tiny")
    times = {"first_scheduled_time": 10.5, "first_token_time": 11.0, "last_token_time": 12.0, "finished_time": 12.25}
    metrics.observe_first_token(1.0)
    metrics.observe_gap(0.25)
    metrics.observe_end(ended(**times), ["stop", "length"])
    found = values(metrics.text(None))
    for name, value in {
        "time_to_first_token_seconds": 1.0,
        "inter_token_latency_seconds": 0.25,
        "request_time_per_output_token_seconds": 0.25,
        "e2e_request_latency_seconds": 2.25,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 1.25,
        "request_inference_time_seconds": 1.75,
        "request_prompt_tokens": 3,
        "request_generation_tokens": 5,
        "request_params_n": 2,
    }.items():
        assert found[f"{PREFIX}{name}_sum"] == pytest.approx(value), name
        assert found[f"{PREFIX}{name}_count"] == 1, name
    assert found[PREFIX + "request_success_total{finished_reason=stop}"] == 1
    assert found[PREFIX + "request_success_total{finished_reason=length}"] == 1


def test_what_did_not_happen_is_not_observed() -> None:
    metrics = ServerMetrics("tiny")
    metrics.observe_end(ended(finished_time=12.0), ["abort"])
    found = values(metrics.text(None))
    assert found[PREFIX + "request_decode_time_seconds_count"] == 0
    assert found[PREFIX + "e2e_request_latency_seconds_count"] == 1


def test_the_engines_numbers() -> None:
    found = values(ServerMetrics("tiny").text(STATS))
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "kv_cache_usage_perc": 0.75,
        "num_frontends": 16,
        "prompt_tokens_total": 14,
        "generation_tokens_total": 15,
        "prefix_cache_queries_total": 19,
        "prefix_cache_hits_total": 20,
        "num_preemptions_total": 12,
        "preempted_tokens_total": 13,
        "engine_steps_total": 17,
        "worker_restarts_total": 23,
    }
    assert {name: found[PREFIX + name] for name in expected} == expected
    assert len(expected) == len(ENGINE_METRICS)
    assert PREFIX + "num_requests_running" not in values(ServerMetrics("tiny").text(None))


def test_methods_nobody_knows_are_one_label() -> None:
    metrics = ServerMetrics("tiny")
    for method in ("GET", "BREW", "X" * 1000):
        metrics.count_http(method, 405)
    found = values(metrics.text(None))
    assert found[PREFIX + "http_requests_total{method=other,status=405}"] == 2


def test_two_servers_in_one_process_count_for_themselves() -> None:
    first, second = ServerMetrics("tiny"), ServerMetrics("tiny")
    first.count_rejected(400)
    assert PREFIX + "request_rejected_total{status=400}" in values(first.text(None))
    assert PREFIX + "request_rejected_total{status=400}" not in values(second.text(None))


def test_the_counts_of_several_processes_add_up_and_a_file_that_is_being_made_holds_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, name = {"model_name": "tiny", "finished_reason": "length"}, PREFIX + "request_success"
    for pid, count in ((11, 8.0), (12, 12.0)):
        file = MmapedDict(str(tmp_path / f"counter_{pid}.db"))  # type: ignore[no-untyped-call]
        key = mmap_key(name, f"{name}_total", [*labels], [*labels.values()], "Answers.")
        file.write_value(key, count, 0.0)  # type: ignore[no-untyped-call]
        file.close()  # type: ignore[no-untyped-call]
    (tmp_path / "counter_13.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    page = values(ServerMetrics("tiny", in_several_processes=True).text(None))
    assert page == {PREFIX + "request_success_total{finished_reason=length}": 20}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted_before_its_last_byte_is_sent(core: FakeCore, stream: bool) -> None:
    """Whoever has all of it may ask another process for the page, which then shows it."""
    http, success = "http_requests_total{method=POST,status=200}", "request_success_total{finished_reason=length}"

    async def scenario(server: Served) -> None:
        requests, answers = [], []

        def look(_: Message) -> None:
            found = values(server.context.metrics.text(None))
            requests.append(found.get(PREFIX + http, 0))
            answers.append(found.get(PREFIX + success, 0))

        body = {"prompt": "abc", "max_tokens": 4, "stream": stream}
        visit = Visit(server.app, "/v1/completions", body, on_send=look)
        await visit.task
        assert requests == [0] * (len(requests) - 1) + [1]
        assert answers[-1] == 1

    run(core.endpoint, scenario)


def test_a_request_whose_client_leaves_is_counted_once(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, "/v1/completions", {"prompt": "abc", "max_tokens": 150_000, "stream": True})
        await visit.sent(2)
        visit.hang_up()
        await visit.task
        found = values(server.context.metrics.text(None))
        assert found[PREFIX + "http_requests_total{method=POST,status=200}"] == 1

    run(endless.endpoint, scenario)


def test_the_page_of_a_server(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"prompt": "abc", "max_tokens": 4}
        await server.post("/v1/completions", body)
        await server.events("/v1/completions", body | {"n": 2})
        await server.post("/v1/completions", {"prompt": [-1]})
        answer = await server.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        found = values(answer.content)
        assert found[PREFIX + "request_success_total{finished_reason=length}"] == 3
        assert found[PREFIX + "request_rejected_total{status=400}"] == 1
        assert found[PREFIX + "time_to_first_token_seconds_count"] == 2
        assert found[PREFIX + "request_generation_tokens_sum"] == 12
        names = {re.sub(r"(_total|_bucket|_sum|_count)?(\{.*)?$", "", name).removeprefix(PREFIX) for name in found}
        assert {spec.name for spec in (*REQUEST_METRICS, *ENGINE_METRICS)} <= names

    run(core.endpoint, scenario)
