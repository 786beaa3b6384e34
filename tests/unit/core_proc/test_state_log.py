"""When a line about the engine is due, and what it says."""

import msgspec
import pytest

from folovllm.common.messages.frontend_core import EngineStats
from folovllm.core_proc.state_log import StateLog

IDLE = EngineStats(0, 0, 0, 100, 100, 0, 0, 0, 0, 0, 1, 0, 0)


def working(**fields: int) -> EngineStats:
    return msgspec.structs.replace(IDLE, **{"num_running": 1, "num_free_blocks": 90, **fields})


def test_an_idle_engine_says_nothing() -> None:
    log = StateLog(10.0)
    assert not any(log.is_due(float(second), False) for second in range(100))


def test_the_first_line_comes_an_interval_after_work_began_then_one_each() -> None:
    log = StateLog(10.0)
    due = []
    for second in range(100, 141):
        if log.is_due(float(second), True):
            due.append(second)
            log.line(float(second), working())
    assert due == [110, 120, 130, 140]


def test_an_engine_that_has_become_idle_says_so_once() -> None:
    log = StateLog(10.0)
    assert not log.is_due(0.0, True)
    assert not log.is_due(3.0, False)
    assert log.is_due(10.0, False)
    assert log.line(10.0, IDLE).startswith("Running: 0 reqs, Waiting: 0 reqs, KV cache usage: 0.0 %")
    assert not any(log.is_due(float(second), False) for second in range(11, 60))
    assert not log.is_due(60.0, True)
    assert log.is_due(70.0, True)


def test_restarts_and_a_missing_worker_are_told_where_there_are_any() -> None:
    log = StateLog(10.0)
    log.is_due(0.0, True)
    assert log.line(10.0, working()).endswith("Preemptions: 0")
    recovering = working(num_worker_restarts_total=2, is_recovering=True)
    assert log.line(20.0, recovering).endswith("Preemptions: 0, Worker restarts: 2, waiting for the next worker")
    assert log.line(30.0, working(num_worker_restarts_total=2)).endswith(", Worker restarts: 2")


def test_an_interval_of_zero_is_never() -> None:
    log = StateLog(0.0)
    assert not any(log.is_due(float(second), True) for second in range(100))


def test_the_line_has_rates_of_the_interval_and_the_state_of_now() -> None:
    log = StateLog(2.0)
    log.is_due(5.0, True)
    first = working(
        num_running=8,
        num_waiting=3,
        num_free_blocks=58,
        num_prompt_tokens_total=1000,
        num_output_tokens_total=50,
        num_cache_queries_total=1000,
        num_cache_hits_total=630,
        num_preemptions_total=2,
    )
    assert log.is_due(7.0, True)
    assert log.line(7.0, first) == (
        "Running: 8 reqs, Waiting: 3 reqs, KV cache usage: 42.0 %, Prefix cache hit rate: 63.0 %, "
        "Prompt: 500.0 tokens/s, Generation: 25.0 tokens/s, Preemptions: 2"
    )
    second = msgspec.structs.replace(first, num_output_tokens_total=150, num_preemptions_total=3)
    assert log.is_due(11.0, True)
    assert log.line(11.0, second) == (
        "Running: 8 reqs, Waiting: 3 reqs, KV cache usage: 42.0 %, Prefix cache hit rate: -, Prompt: 0.0 tokens/s, "
        "Generation: 25.0 tokens/s, Preemptions: 1"
    )


def test_a_line_nobody_asked_for_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="no line is due"):
        StateLog(1.0).line(1.0, IDLE)
