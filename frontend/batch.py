"""The requests of one `generate` call: which are to be sent, which are in the core, which are done."""

from collections import deque
from collections.abc import Iterable, Sequence

from folovllm.frontend.input_processor import Request
from folovllm.frontend.output_processor import RequestState
from folovllm.frontend.outputs import RequestOutput

MAX_IN_CORE = 4096  # answers of one call that are in the core at once, so that its bounded queue has room for others


class Batch:
    """Sent in portions, answered in any order, returned in the order given.

    Attributes:
        states: of the requests sent so far, in order; whoever sends appends to it.
    """

    def __init__(self, requests: Sequence[Request], max_in_core: int = MAX_IN_CORE) -> None:
        self._unsent = deque(requests)
        self._total = len(requests)
        self._max_in_core = max_in_core
        self._in_core: dict[int, RequestState] = {}
        self._num_answers_in_core = 0
        self._num_noted = 0
        self._num_done = 0
        self._outputs: list[RequestOutput] = []
        self.states: list[RequestState] = []

    @property
    def finished(self) -> bool:
        return self._num_done == self._total

    @property
    def waits(self) -> bool:
        """Whether something is in the core that was sent before or by the latest portion."""
        self._note_sent()
        return bool(self._in_core)

    def next_portion(self) -> list[Request]:
        """The requests that may be sent now; a single one with very many answers always may."""
        portion: list[Request] = []
        answers = self._num_answers_in_core
        while self._unsent and (answers == 0 or answers + self._unsent[0].params.n <= self._max_in_core):
            answers += self._unsent[0].params.n
            portion.append(self._unsent.popleft())
        return portion

    def take_finished(self, states: Iterable[RequestState]) -> list[RequestOutput]:
        """The outputs of those among `states` that are this call's, and of those finished without the core.

        Raises the error of the first one that failed.
        """
        self._note_sent()
        taken, self._outputs = self._outputs, []
        for state in states:
            if self._in_core.pop(id(state), None) is not None:
                self._num_answers_in_core -= state.request.params.n
                self._num_done += 1
                taken.append(state.whole())
        return taken

    def _note_sent(self) -> None:
        for state in self.states[self._num_noted :]:
            if state.finished:
                self._num_done += 1
                self._outputs.append(state.whole())
            else:
                self._in_core[id(state)] = state
                self._num_answers_in_core += state.request.params.n
        self._num_noted = len(self.states)

    def outputs(self) -> list[RequestOutput]:
        """All outputs in order; the call is finished."""
        return [state.whole() for state in self.states]
