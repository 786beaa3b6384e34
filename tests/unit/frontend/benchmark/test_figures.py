"""Figures of made-up records: what a time is, what a rate is, what is good."""

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.figures import (
    is_good,
    itl,
    latencies,
    most_at_once,
    parse_goodput,
    serving_figures,
    tpot,
    ttft,
)
from folovllm.frontend.benchmark.http_request import Record
from folovllm.frontend.benchmark.load import Outcome
from folovllm.frontend.benchmark.workload import Work

WORK = Work("a", 4, 9)


def record(*times: float, sent: float = 10.0, tokens: int | None = None, error: str = "") -> Record:
    return Record(WORK, sent, sent, list(times), 4, len(times) if tokens is None else tokens, error)


def test_times_of_one_request() -> None:
    one = record(10.5, 10.6, 10.9, tokens=5)
    assert ttft(one) == pytest.approx(0.5)
    assert tpot(one) == pytest.approx(0.1), "0.4 s for four tokens after the first, though in two events"
    assert itl(one) == pytest.approx([0.1, 0.3])
    assert tpot(record(10.5)) is None and itl(record(10.5)) == []


def test_figures_of_a_run() -> None:
    records = [record(10.1, 10.2, 10.3), record(10.5, 10.6, 10.7, sent=10.2, tokens=5), record(error="broken")]
    figures = serving_figures(Outcome(records, 9.7), [50, 99], {})
    assert {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 8,
        "total_output_tokens": 8,
        "max_concurrent_requests": 2,
    }.items() <= figures.items()
    assert figures["duration"] == pytest.approx(1.0), "from the start to the last token"
    assert figures["request_throughput"] == pytest.approx(2.0)
    assert figures["output_throughput"] == pytest.approx(8.0)
    assert figures["total_token_throughput"] == pytest.approx(16.0)
    assert figures["mean_ttft_ms"] == figures["p50_ttft_ms"] == pytest.approx(200.0)
    assert figures["std_ttft_ms"] == pytest.approx(100.0)
    assert figures["p99_ttft_ms"] == pytest.approx(298.0)
    assert figures["median_tpot_ms"] == pytest.approx(75.0)
    assert figures["mean_itl_ms"] == pytest.approx(100.0)
    assert figures["mean_e2el_ms"] == pytest.approx(400.0)
    assert figures["mean_client_lag_ms"] == 0.0
    assert "request_goodput" not in figures


def test_a_run_in_which_everything_failed() -> None:
    figures = serving_figures(Outcome([record(error="x")], 5.0), [50], {"ttft": 1.0})
    assert (figures["completed"], figures["duration"], figures["request_throughput"]) == (0, 0.0, None)
    assert figures["mean_ttft_ms"] is figures["p50_e2el_ms"] is figures["request_goodput"] is None


def test_values_of_all_requests_are_gathered() -> None:
    found = latencies([record(10.5), record(10.1, 10.2)])
    assert {name: len(values) for name, values in found.items()} == {"ttft": 2, "tpot": 1, "itl": 1, "e2el": 2}


def test_goodput_counts_requests_that_keep_all_bounds() -> None:
    records = [record(10.1, 10.2), record(10.1, 11.1), record(10.6, 10.7), record(10.1)]
    bounds = parse_goodput(["ttft:200", "tpot:500"])
    assert [is_good(each, bounds) for each in records] == [True, False, False, True]
    figures = serving_figures(Outcome(records, 10.0), [50], bounds)
    assert figures["request_goodput"] == pytest.approx(2 / 1.1)
    assert figures["goodput_bounds_ms"] == {"ttft": 200.0, "tpot": 500.0}
    assert not is_good(records[0], {"e2el": 199.0}) and is_good(records[0], {"e2el": 201.0})


@pytest.mark.parametrize(
    "text, message",
    [
        ("ttft", "no METRIC:MILLISECONDS, such as ttft:200"),
        ("ttft:", "no METRIC:MILLISECONDS"),
        ("ttft:fast", "no METRIC:MILLISECONDS"),
        ("itl:5", "one of ttft, tpot, e2el"),
        ("ttft:0", "must be above 0 ms"),
        ("ttft:nan", "must be above 0 ms"),
    ],
)
def test_bounds_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_goodput([text])


def test_most_at_once() -> None:
    assert most_at_once([]) == 0
    assert most_at_once([record(11.0), record(11.5, sent=10.5), record(12.0, sent=11.2)]) == 2
