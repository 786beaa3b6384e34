"""The requests that wait for a slot, in the order in which they will get one.

FCFS: as they arrived. Priority: lower numbers first, and as they arrived within one number. Requests that were
preempted come before the others of their priority, whatever the policy. A heap with lazy removal: a request taken out
of the middle leaves its entry behind, which is skipped when it comes up, and swept when such entries are the majority.
"""

import heapq

from folovllm.common.config import SchedulingPolicy
from folovllm.core_proc.request import Request, RequestStatus

Rank = tuple[int, int]
_Entry = tuple[int, bool, int, int, Request]  # priority, is new, arrival, push (so that two entries never tie), request


class RequestQueue:
    """push, pop: O(log n); peek, remove: O(1), amortised."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._by_priority = policy == "priority"
        self._heap: list[_Entry] = []
        self._waiting: dict[Request, _Entry] = {}
        self._num_pushed = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def in_order(self) -> list[Request]:
        """All of them as they would be popped. O(n log n); for checks."""
        return [entry[-1] for entry in sorted(self._waiting.values())]

    def first(self, most: int) -> list[Request]:
        """The next few, at most `most`, in order. O(most · log(most)) whatever waits: the heap is walked as a tree."""
        self._drop_stale_top()
        frontier = [(entry, 0) for entry in self._heap[:1]]
        found: list[Request] = []
        while frontier and len(found) < most:
            entry, place = heapq.heappop(frontier)
            if self._is_current(entry):
                found.append(entry[-1])
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(self._heap):
                    heapq.heappush(frontier, (self._heap[child], child))
        return found

    def rank(self, request: Request) -> Rank:
        """The request's place among all, running ones included: the lower, the sooner it is served."""
        return (request.priority if self._by_priority else 0, request.arrival_order)

    def push(self, request: Request) -> None:
        assert request not in self._waiting, request.describe()
        priority, arrival_order = self.rank(request)
        is_new = request.status is not RequestStatus.PREEMPTED
        entry = (priority, is_new, arrival_order, self._num_pushed, request)
        self._num_pushed += 1
        heapq.heappush(self._heap, entry)
        self._waiting[request] = entry
        self.num_tokens += request.num_queue_tokens

    def peek(self) -> Request | None:
        """The next one, or None if nobody waits."""
        self._drop_stale_top()
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Request:
        """Takes out the next one; there must be one."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        """Takes out a request that waits here."""
        self._forget(request)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = list(self._waiting.values())
            heapq.heapify(self._heap)

    def _drop_stale_top(self) -> None:
        while self._heap and not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)

    def _is_current(self, entry: _Entry) -> bool:
        return self._waiting.get(entry[-1]) is entry

    def _forget(self, request: Request) -> None:
        del self._waiting[request]
        self.num_tokens -= request.num_queue_tokens
