"""Which requests have run out of their time (`timeout_s`), and when the next one will.

A heap by time. A request that ends earlier leaves its entry behind: nobody has to tell. Such entries are dropped when
they come up, and swept once as many have been added as were left after the last sweep, so that the heap holds at most
twice the live ones (and a few).
"""

import heapq
import math
from collections.abc import Sequence
from typing import Final

from folovllm.core_proc.request import Request

_Entry = tuple[float, int, list[Request]]  # time, how many were added before (so that two never tie), answers

_FEW: Final = 64


class Deadlines:
    """add: O(log n), amortised; next_s, take_due: O(log n) for each entry dropped."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._num_added = 0
        self._sweep_at = _FEW

    def __len__(self) -> int:
        """Entries held, those of ended requests included."""
        return len(self._heap)

    def add(self, requests: Sequence[Request], at_s: float) -> None:
        """These answers to one prompt end at `at_s`."""
        heapq.heappush(self._heap, (at_s, self._num_added, list(requests)))
        self._num_added += 1
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if _is_live(entry)]
            heapq.heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + _FEW

    def next_s(self) -> float | None:
        """When the next live request runs out of time; None if there is no bound."""
        while self._heap and not _is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def wait_ms(self, now_s: float, most_ms: int | None) -> int | None:
        """How long one may sleep: until the next deadline, at most `most_ms` (None sets no bound)."""
        next_s = self.next_s()
        if next_s is None:
            return most_ms
        left_ms = max(math.ceil((next_s - now_s) * 1000), 0)
        return left_ms if most_ms is None else min(left_ms, most_ms)

    def take_due(self, now_s: float) -> list[Request]:
        """The live requests whose time is over, earliest first; each is told once."""
        due: list[Request] = []
        while self._heap and self._heap[0][0] <= now_s:
            due += [request for request in heapq.heappop(self._heap)[-1] if not request.is_finished]
        return due


def _is_live(entry: _Entry) -> bool:
    return not all(request.is_finished for request in entry[-1])
