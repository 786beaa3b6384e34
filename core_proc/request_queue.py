"""The requests that wait for a slot, in the order in which they will get one.

FCFS: as they arrived. Priority: lower numbers first, and as they arrived within one number. Requests that were
preempted come before the others of their priority, whatever the policy. A heap with lazy removal: a request taken out
of the middle leaves its entry behind, which is skipped when it comes up, and swept when such entries are the majority.
"""

import heapq

from folovllm.common.config import SchedulingPolicy
from folovllm.core_proc.request import Request, RequestStatus

Rank = tuple[int, int]


class RequestQueue:
    """push, pop: O(log n); peek, remove: O(1), amortised."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._by_priority = policy == "priority"
        self._heap: list[tuple[int, bool, int, Request]] = []
        self._waiting: set[Request] = set()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def in_order(self) -> list[Request]:
        """All of them as they would be popped. O(n log n); for checks."""
        return [entry[-1] for entry in sorted(self._heap) if entry[-1] in self._waiting]

    def rank(self, request: Request) -> Rank:
        """The request's place among all, running ones included: the lower, the sooner it is served."""
        return (request.priority if self._by_priority else 0, request.arrival_order)

    def push(self, request: Request) -> None:
        assert request not in self._waiting, request.describe()
        priority, arrival_order = self.rank(request)
        is_new = request.status is not RequestStatus.PREEMPTED
        heapq.heappush(self._heap, (priority, is_new, arrival_order, request))
        self._waiting.add(request)
        self.num_tokens += request.num_queue_tokens

    def peek(self) -> Request | None:
        """The next one, or None if nobody waits."""
        while self._heap and self._heap[0][-1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Request:
        """Takes out the next one; there must be one."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        """Takes out a request that waits here. It must not come back: its old entry would come with it."""
        self._forget(request)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [entry for entry in self._heap if entry[-1] in self._waiting]
            heapq.heapify(self._heap)

    def _forget(self, request: Request) -> None:
        self._waiting.remove(request)
        self.num_tokens -= request.num_queue_tokens
