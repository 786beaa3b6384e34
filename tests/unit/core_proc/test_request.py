"""States, times, and what a request shows in an error."""

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.core_proc.request import MAX_HISTORY, Request, RequestStatus

LEGAL = {
    ("WAITING", "RUNNING"),
    ("WAITING", "FINISHED_ABORTED"),
    ("WAITING", "FINISHED_TIMED_OUT"),
    ("WAITING", "FINISHED_ERROR"),
    ("RUNNING", "PREEMPTED"),
    ("RUNNING", "FINISHED_STOPPED"),
    ("RUNNING", "FINISHED_LENGTH_CAPPED"),
    ("RUNNING", "FINISHED_ABORTED"),
    ("RUNNING", "FINISHED_TIMED_OUT"),
    ("RUNNING", "FINISHED_ERROR"),
    ("PREEMPTED", "RUNNING"),
    ("PREEMPTED", "FINISHED_STOPPED"),  # its grammar turns out to be complete
    ("PREEMPTED", "FINISHED_ABORTED"),
    ("PREEMPTED", "FINISHED_TIMED_OUT"),
    ("PREEMPTED", "FINISHED_ERROR"),
}
REASONS = {
    "FINISHED_STOPPED": "stop",
    "FINISHED_LENGTH_CAPPED": "length",
    "FINISHED_ABORTED": "abort",
    "FINISHED_TIMED_OUT": "timeout",
    "FINISHED_ERROR": "error",
}


def a_request(
    num_prompt_tokens: int = 3, max_tokens: int = 5, sample_index: int = 0, parent: Request | None = None
) -> Request:
    return Request(
        client=1,
        number=7,
        request_id="mine",
        prompt_token_ids=np.arange(num_prompt_tokens, dtype=np.int32),
        sampling=SamplingRow(seed=5),
        max_tokens=max_tokens,
        arrival_s=10.0,
        sample_index=sample_index,
        parent=parent,
    )


@pytest.mark.parametrize("before", list(RequestStatus))
@pytest.mark.parametrize("after", list(RequestStatus))
def test_only_the_listed_transitions_exist(before: RequestStatus, after: RequestStatus) -> None:
    request = a_request()
    request.status = before
    if (before.name, after.name) in LEGAL:
        request.become(after, "test")
        assert request.status is after
    else:
        with pytest.raises(ValueError, match=f"no way from {before.name} to {after.name}"):
            request.become(after, "test")
        assert request.status is before


@pytest.mark.parametrize("status", list(RequestStatus))
def test_every_end_has_its_reason(status: RequestStatus) -> None:
    request = a_request()
    request.status = status
    assert request.is_finished == (status.name in REASONS)
    if request.is_finished:
        assert request.finish_reason == REASONS[status.name]
    else:
        with pytest.raises(KeyError):
            _ = request.finish_reason


def test_the_sample_index_goes_into_what_the_worker_gets_and_the_rest_stays() -> None:
    assert a_request(sample_index=3).sampling == SamplingRow(seed=5, sample_index=3)
    assert a_request().sampling == SamplingRow(seed=5)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(0, 1), (1, 0), (1, -1)])
def test_nothing_to_read_or_nothing_to_generate_is_no_request(num_prompt_tokens: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        a_request(num_prompt_tokens, max_tokens)


def test_times_count_from_arrival() -> None:
    request = a_request()
    assert (request.queue_s, request.first_token_s, request.total_s) == (0.0, 0.0, 0.0)
    request.scheduled_at_s, request.first_token_at_s, request.finished_at_s = 10.5, 11.0, 14.0
    assert (request.queue_s, request.first_token_s, request.total_s) == (0.5, 1.0, 4.0)


def test_a_request_that_never_ran_has_queued_all_its_life() -> None:
    request = a_request()
    request.finished_at_s = 12.0
    assert (request.queue_s, request.first_token_s, request.total_s) == (2.0, 0.0, 2.0)


def test_confirmed_tokens_are_prompt_and_output_and_a_child_weighs_one_token_in_the_queue() -> None:
    request = a_request(num_prompt_tokens=4)
    assert (request.num_prompt_tokens, request.num_confirmed_tokens, request.num_queue_tokens) == (4, 4, 4)
    request.output_token_ids = np.array([1, 2], np.int32)
    assert request.num_confirmed_tokens == 6
    assert a_request(num_prompt_tokens=4, sample_index=1, parent=request).num_queue_tokens == 1


def test_the_history_is_bounded_and_shown() -> None:
    request = a_request()
    request.become(RequestStatus.RUNNING, "step 3")
    assert "'mine' (client 1, number 7)" in request.describe()
    assert "WAITING -> RUNNING: step 3" in request.describe()
    for event in range(2 * MAX_HISTORY):
        request.note(f"event {event}")
    assert len(request.history) == MAX_HISTORY
    assert "step 3" not in request.describe()
    assert f"event {2 * MAX_HISTORY - 1}" in request.describe()


def test_requests_are_told_apart_by_identity() -> None:
    assert a_request() != a_request()
    assert len({a_request(), a_request()}) == 2
