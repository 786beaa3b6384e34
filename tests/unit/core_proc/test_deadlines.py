"""Requests that run out of time: when the next one does, and that no ended one is told or kept."""

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.core_proc.deadlines import Deadlines
from folovllm.core_proc.request import Request, RequestStatus


def make_request(number: int) -> Request:
    return Request(0, number, "r", np.ones(1, np.int32), SamplingRow(), max_tokens=1)


def end(request: Request) -> None:
    request.become(RequestStatus.FINISHED_ABORTED, "test")


def test_they_come_up_in_the_order_of_their_times() -> None:
    deadlines = Deadlines()
    requests = [make_request(number) for number in range(4)]
    for request, at_s in zip(requests, (5.0, 3.0, 9.0, 3.0), strict=True):
        deadlines.add([request], at_s)
    assert deadlines.next_s() == 3.0
    assert deadlines.take_due(2.9) == []
    assert deadlines.take_due(5.0) == [requests[1], requests[3], requests[0]]
    assert deadlines.take_due(5.0) == []
    assert deadlines.next_s() == 9.0


def test_the_answers_to_a_prompt_end_together_but_for_those_that_have_ended() -> None:
    deadlines = Deadlines()
    answers = [make_request(number) for number in range(3)]
    deadlines.add(answers, 2.0)
    end(answers[1])
    assert deadlines.next_s() == 2.0
    assert deadlines.take_due(2.0) == [answers[0], answers[2]]


def test_ended_requests_set_no_bound() -> None:
    deadlines = Deadlines()
    first, second = make_request(1), make_request(2)
    deadlines.add([first], 1.0)
    deadlines.add([second], 2.0)
    end(first)
    assert deadlines.next_s() == 2.0
    end(second)
    assert deadlines.next_s() is None
    assert len(deadlines) == 0
    assert deadlines.take_due(3.0) == []


@pytest.mark.parametrize(
    ("at_s", "most_ms", "expected"),
    [
        (None, 1000, 1000),
        (None, None, None),
        (10.25, 1000, 250),
        (10.25, None, 250),
        (10.0001, 1000, 1),  # rounded up: a poll that ends too early would be repeated
        (12.0, 1000, 1000),
        (9.0, 1000, 0),
    ],
)
def test_how_long_one_may_sleep(at_s: float | None, most_ms: int | None, expected: int | None) -> None:
    deadlines = Deadlines()
    if at_s is not None:
        deadlines.add([make_request(1)], at_s)
    assert deadlines.wait_ms(10.0, most_ms) == expected


def test_many_requests_with_an_hour_each_leave_nothing_behind() -> None:
    deadlines = Deadlines()
    live = [make_request(number) for number in range(10)]
    for request in live:
        deadlines.add([request], 3600.0)
    longest = 0
    for number in range(5000):
        request = make_request(number)
        deadlines.add([request], 3600.0 + number)
        end(request)
        longest = max(longest, len(deadlines))
    assert longest < 200
    assert deadlines.take_due(1e9) == live
