"""Whose turn it is to run alone, and when it is over."""

import numpy as np

from folovllm.common.config import MAX_PIPELINE_DEPTH
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.core_proc.isolation import Isolation, note_crash
from folovllm.core_proc.request import Request, RequestStatus


def request_of(number: int, num_tokens: int = 3) -> Request:
    """One that was in flight at two ends, with these tokens."""
    request = Request(0, number, "", np.ones(num_tokens, np.int32), SamplingRow(), 10)
    for _ in range(2):
        note_crash(request, num_tokens)
    return request


def test_crashes_at_one_place_add_up() -> None:
    request = request_of(0, num_tokens=3)
    assert request.num_crashes == 2
    note_crash(request, 3 + MAX_PIPELINE_DEPTH - 1)  # perhaps the same token
    assert request.num_crashes == 3


def test_a_crash_further_on_is_the_first_again() -> None:
    request = request_of(0, num_tokens=3)
    note_crash(request, 3 + MAX_PIPELINE_DEPTH)
    assert (request.num_crashes, request.num_tokens_at_crash) == (1, 3 + MAX_PIPELINE_DEPTH)


def test_nobody_is_suspected_at_first() -> None:
    isolation = Isolation()
    assert isolation.first() is None
    assert not isolation


def test_suspects_come_in_order_and_once() -> None:
    isolation, first, second = Isolation(), request_of(0), request_of(1)
    isolation.add([first])
    isolation.add([second, first])
    assert len(isolation) == 2
    assert isolation.first() is first


def test_a_suspect_is_cleared_by_more_tokens_than_were_in_flight() -> None:
    isolation, request = Isolation(), request_of(0, num_tokens=3)
    isolation.add([request])
    assert isolation.clear(3) is None
    assert isolation.clear(3 + MAX_PIPELINE_DEPTH - 1) is None
    assert request.num_crashes == 2
    assert isolation.clear(3 + MAX_PIPELINE_DEPTH) is request
    assert request.num_crashes == 0
    assert isolation.first() is None


def test_who_has_ended_is_passed_over() -> None:
    isolation, requests = Isolation(), [request_of(number) for number in range(3)]
    isolation.add(requests)
    for request in requests[:2]:
        request.become(RequestStatus.FINISHED_ABORTED, "test")
    assert isolation.first() is requests[2]
    assert len(isolation) == 1
