"""Order of waiting, against a sorted list."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from folovllm.common.config import SchedulingPolicy
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.request_queue import RequestQueue


def a_request(order: int, priority: int = 0, status: RequestStatus = RequestStatus.WAITING) -> Request:
    prompt = np.zeros(order % 5 + 1, np.int32)
    request = Request(0, order, f"r{order}", prompt, SamplingRow(), 4, priority)
    request.arrival_order = order
    request.status = status
    return request


def drain(queue: RequestQueue) -> list[int]:
    return [queue.pop().number for _ in range(len(queue))]


def test_first_come_first_served_ignores_priority() -> None:
    queue = RequestQueue("fcfs")
    for order, priority in ((2, 0), (0, 9), (1, -3)):
        queue.push(a_request(order, priority))
    assert drain(queue) == [0, 1, 2]


def test_lower_priority_numbers_first_then_arrival() -> None:
    queue = RequestQueue("priority")
    for order, priority in ((0, 1), (1, 0), (2, 1), (3, -1), (4, 0)):
        queue.push(a_request(order, priority))
    assert drain(queue) == [3, 1, 4, 0, 2]


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [3, 4, 0, 1, 2]), ("priority", [3, 0, 2, 4, 1])])
def test_preempted_requests_come_before_others_of_their_priority(policy: SchedulingPolicy, expected: list[int]) -> None:
    queue = RequestQueue(policy)
    for order, priority in ((0, 0), (1, 1), (2, 0)):
        queue.push(a_request(order, priority))
    queue.push(a_request(4, 1, RequestStatus.PREEMPTED))
    queue.push(a_request(3, 0, RequestStatus.PREEMPTED))
    assert [request.number for request in queue.in_order()] == expected
    assert drain(queue) == expected


def test_peek_shows_the_next_without_taking_it() -> None:
    queue = RequestQueue("fcfs")
    assert queue.peek() is None
    first = a_request(0)
    queue.push(first)
    assert queue.peek() is first
    assert first in queue
    assert len(queue) == 1


def test_tokens_follow_the_requests() -> None:
    queue = RequestQueue("fcfs")
    requests = [a_request(order) for order in range(4)]
    for request in requests:
        queue.push(request)
    assert queue.num_tokens == 1 + 2 + 3 + 4
    queue.remove(requests[2])
    queue.pop()
    assert queue.num_tokens == 2 + 4


def test_removing_many_leaves_no_entries_behind() -> None:
    queue = RequestQueue("fcfs")
    requests = [a_request(order) for order in range(1000)]
    for request in requests:
        queue.push(request)
    for request in requests[:-1]:
        queue.remove(request)
    assert len(queue._heap) <= 2 * 1 + 64
    assert drain(queue) == [999]
    assert queue.peek() is None


def test_a_request_waits_once_and_only_what_waits_can_go() -> None:
    queue = RequestQueue("fcfs")
    request = a_request(0)
    queue.push(request)
    with pytest.raises(AssertionError, match="r0"):
        queue.push(request)
    queue.pop()
    with pytest.raises(KeyError):
        queue.remove(request)
    with pytest.raises(AssertionError, match="empty"):
        queue.pop()


class QueueMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(["fcfs", "priority"]))
    def start(self, policy: SchedulingPolicy) -> None:
        self.policy = policy
        self.queue = RequestQueue(policy)
        self.model: list[Request] = []
        self.popped: list[Request] = []
        self.num_made = 0

    def in_order(self) -> list[Request]:
        def key(request: Request) -> tuple[int, bool, int]:
            priority = request.priority if self.policy == "priority" else 0
            return priority, request.status is not RequestStatus.PREEMPTED, request.arrival_order

        return sorted(self.model, key=key)

    @rule(priority=st.integers(-2, 2))
    def push(self, priority: int) -> None:
        request = a_request(self.num_made, priority)
        self.num_made += 1
        self.queue.push(request)
        self.model.append(request)

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        expected = self.in_order()[0]
        assert self.queue.peek() is expected
        assert self.queue.pop() is expected
        self.model.remove(expected)
        self.popped.append(expected)

    @precondition(lambda self: self.popped)
    @rule()
    def come_back(self) -> None:
        request = self.popped.pop()
        request.status = RequestStatus.PREEMPTED
        self.queue.push(request)
        self.model.append(request)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        self.queue.remove(request)

    @invariant()
    def agrees_with_a_sorted_list(self) -> None:
        assert self.queue.in_order() == self.in_order()
        assert len(self.queue) == len(self.model)
        assert self.queue.num_tokens == sum(request.num_prompt_tokens for request in self.model)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)
