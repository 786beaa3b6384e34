"""Requests that may be what ended a worker: each runs alone until it has got past the place where it was.

An answer's tokens are a function of its own history alone, so a request that ends workers does it again and again at
the same place, alone or not. Once it has so many tokens more than steps can have been in flight, whatever was computed
for it then has been computed without harm: that end was not its fault, and is not counted any more.
"""

import collections
from collections.abc import Sequence

from folovllm.common.config import MAX_PIPELINE_DEPTH
from folovllm.core_proc.request import Request


def note_crash(request: Request, num_confirmed_tokens: int) -> None:
    """A worker has ended with the request in flight, which has so many confirmed tokens."""
    if _is_past(request, num_confirmed_tokens):
        request.num_crashes = 0
    request.num_crashes += 1
    request.num_tokens_at_crash = num_confirmed_tokens


class Isolation:
    """Who is to run alone, in order."""

    def __init__(self) -> None:
        self._suspects: collections.deque[Request] = collections.deque()

    def __len__(self) -> int:
        return len(self._suspects)

    def add(self, requests: Sequence[Request]) -> None:
        """These come next; one that is suspected already keeps its place."""
        self._suspects.extend(request for request in requests if request not in self._suspects)

    def first(self) -> Request | None:
        """Whose turn it is: everybody else waits. None: nobody is suspected."""
        while self._suspects and self._suspects[0].is_finished:
            self._suspects.popleft()
        return self._suspects[0] if self._suspects else None

    def clear(self, num_confirmed_tokens: int) -> Request | None:
        """The first, who has so many confirmed tokens, if these clear it; then it is no suspect any more."""
        if not _is_past(self._suspects[0], num_confirmed_tokens):
            return None
        request = self._suspects.popleft()
        request.num_crashes = 0
        return request


def _is_past(request: Request, num_confirmed_tokens: int) -> bool:
    return num_confirmed_tokens >= request.num_tokens_at_crash + MAX_PIPELINE_DEPTH
