"""Requests that may be what ended a worker: each runs alone until it has got past the place where it was.

An answer's tokens are a function of its own history alone, so a request that ends its worker does it again at the same
place, alone or not. Once it has so many tokens more than steps can have been in flight, whatever was computed for it
then has been computed without harm, and it is cleared.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from folovllm.common.config import MAX_PIPELINE_DEPTH
from folovllm.core_proc.request import Request


class _Suspect(NamedTuple):
    request: Request
    num_tokens_when_clear: int


class Isolation:
    """Who is to run alone, in order."""

    def __init__(self) -> None:
        self._suspects: collections.deque[_Suspect] = collections.deque()

    def __len__(self) -> int:
        return len(self._suspects)

    def add(self, requests: Sequence[Request]) -> None:
        """These come next. They must not run at the moment; one that is suspected already keeps its place."""
        known = {suspect.request for suspect in self._suspects}
        for request in requests:
            if request not in known:
                self._suspects.append(_Suspect(request, request.num_confirmed_tokens + MAX_PIPELINE_DEPTH))

    def first(self) -> Request | None:
        """Whose turn it is: everybody else waits. None: nobody is suspected."""
        while self._suspects and self._suspects[0].request.is_finished:
            self._suspects.popleft()
        return self._suspects[0].request if self._suspects else None

    def clear(self, num_confirmed_tokens: int) -> Request | None:
        """The first, who has so many confirmed tokens, if these clear it; then it is no suspect any more."""
        if num_confirmed_tokens < self._suspects[0].num_tokens_when_clear:
            return None
        request = self._suspects.popleft().request
        request.num_crashes = 0
        return request
