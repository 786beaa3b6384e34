"""A whole run against a server of a script: the dictionary, the summary, the picture."""

import json
import math
import pathlib

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.http_request import Record, Target
from folovllm.frontend.benchmark.load import Outcome
from folovllm.frontend.benchmark.picture import course_of, save_serving_picture
from folovllm.frontend.benchmark.serving import Plan, details, errors_told, run_plan, summary
from folovllm.frontend.benchmark.workload import Work
from tests.fakes.scripted_server import ScriptedServer, chat_events

WORKS = [Work(f"prompt {i}", 2, 3) for i in range(4)]


def plan(url: str, rate: float = math.inf) -> Plan:
    target = Target(url + "/v1/chat/completions", "chat", "m", None, {"temperature": 0.0})
    return Plan(target, WORKS, rate, 1.0, 2, 0, 0, [50, 99.9], {"ttft": 60_000.0})


def test_a_run() -> None:
    with ScriptedServer(lambda _: chat_events("a", "b")) as server:
        outcome, result = run_plan(plan(server.url), lambda _: None)
    assert {
        "backend": "chat",
        "model_id": "m",
        "num_prompts": 4,
        "request_rate": "inf",
        "max_concurrency": 2,
        "completed": 4,
        "total_output_tokens": 8,
        "fields": {"temperature": 0.0},
    }.items() <= result.items()
    assert json.loads(json.dumps(result)) == result
    more = details(outcome)
    assert more["output_lens"] == [2, 2, 2, 2] and more["errors"] == [""] * 4
    assert [len(gaps) for gaps in more["itls"]] == [1, 1, 1, 1]
    assert {len(values) for values in more.values()} == {4}
    shown = summary(result, [50, 99.9])
    assert "good requests/s (ttft ≤ 60000 ms)" in shown and "p99.9" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_rates_are_checked_before_anything_is_sent() -> None:
    with ScriptedServer(lambda _: chat_events("a")) as server, pytest.raises(ConfigError, match="--request-rate"):
        run_plan(plan(server.url, rate=0.0), lambda _: None)
    assert server.asked == []


def test_details_and_summary_of_failures() -> None:
    failed = Outcome([Record(WORKS[0], error="broken")], 0.0)
    assert details(failed)["ttfts"] == details(failed)["e2els"] == details(failed)["tpots"] == [None]
    with ScriptedServer(lambda _: chat_events("a")) as server:
        _, result = run_plan(plan(server.url), lambda _: None)
    lines = summary(result | {"request_throughput": None}, [50]).splitlines()
    assert [line.split()[0] for line in lines if line.endswith(" -")] == ["requests/s", "time", "time"]


def test_different_errors_are_told_once_and_not_without_end() -> None:
    records = [Record(WORKS[0], error=f"error {i % 5}" if i else "") for i in range(20)]
    assert errors_told(records) == "error 1\nerror 2\nerror 3\n… and 2 other errors"
    assert errors_told(records[:1]) == ""


def test_the_course_of_a_run() -> None:
    records = [
        Record(WORKS[0], sent=10.0, times=[10.1 + i / 100 for i in range(80)], output_tokens=160),
        Record(WORKS[1], sent=10.5, times=[10.9, 11.0], output_tokens=2),
    ]
    edges, rates, in_work = course_of(records, 10.0)
    assert (edges[0], edges[-1]) == (0.0, pytest.approx(1.0))
    assert sum(rates * (edges[1:] - edges[:-1])) == pytest.approx(162)
    assert list(in_work) == [1, 2]


def test_a_picture(tmp_path: pathlib.Path) -> None:
    records = [Record(WORKS[i], sent=10.0 + i, times=[10.5 + i, 10.6 + i], output_tokens=2) for i in range(4)]
    save_serving_picture(Outcome([*records, Record(WORKS[0], error="x")], 10.0), "a run", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
