"""The loop: frontends' requests in, steps out to the worker, their tokens in, outputs out to the frontends.

`EngineCore.step` is one turn. All decisions are the scheduler's; this file only says what comes after what.
"""

import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from folovllm.common.errors import ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishedRequest,
    GetSnapshot,
    GetStats,
    RejectedRequest,
    ResetPrefixCache,
)
from folovllm.core_proc.admission import Admission
from folovllm.core_proc.deadlines import Deadlines
from folovllm.core_proc.frontends import Frontend, Frontends
from folovllm.core_proc.observer import Observer
from folovllm.core_proc.parent_link import ParentLink
from folovllm.core_proc.recovery import Recovery
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import Scheduler, StepOutcome, only_ends
from folovllm.core_proc.waiter import Waiter

_TICK_MS = 1000  # how late a ping, the bound on a step or the check of the books may be

logger = get_logger(__name__)


class EngineCore:
    """One engine: what was built at its start, and the order in which it works."""

    def __init__(
        self,
        *,
        waiter: Waiter,
        parent: ParentLink,
        frontends: Frontends,
        admission: Admission,
        scheduler: Scheduler,
        recovery: Recovery,
        observer: Observer,
        pipeline_depth: int,
    ) -> None:
        """`waiter` must know the sockets of `frontends` and of the executor already."""
        self._waiter = waiter
        self._parent = parent
        self._frontends = frontends
        self._admission = admission
        self._grammars = admission.grammars
        self._scheduler = scheduler
        self._recovery = recovery
        self._executor = recovery.executor
        self._observer = observer
        self._recorder = observer.recorder
        self._deadlines = Deadlines()
        self._pipeline_depth = pipeline_depth
        self._is_checked = True

    def run(self) -> NoReturn:
        """Works until StopRequested or an EngineError ends it."""
        while True:
            self.step()

    def step(self) -> None:
        """One turn: waits for whatever comes first, then lets it take effect everywhere."""
        sources = self._waiter.wait(self._timeout_ms())
        now_s = time.monotonic()
        outcomes = self._watch_worker(sources, now_s)
        if self._frontends.socket in sources:
            self._receive(now_s)
        if self._executor.socket in sources:
            outcomes += self._collect(now_s)
        self._abort_orphans(now_s)
        outcomes += self._end_overdue(now_s)
        outcomes += self._follow_grammars(now_s)
        self._submit(now_s)  # before the outputs are sent: the worker is not kept waiting
        for outcome in outcomes:
            self._frontends.send_outcome(outcome)
        self._frontends.ping(now_s)
        if self._parent.socket in sources:
            self._parent.pass_over_frames()
        self._observer.look(now_s)
        self._check_when_idle(sources)

    def _timeout_ms(self) -> int | None:
        """None where nothing can become due without a frame: then the process sleeps."""
        tick_ms = self._executor.tick_ms
        if tick_ms is None and (len(self._frontends) or not self._is_checked):
            tick_ms = _TICK_MS
        return self._deadlines.wait_ms(time.monotonic(), tick_ms)

    def _watch_worker(self, sources: list[Any], now_s: float) -> list[StepOutcome]:
        failed = self._recovery.look(sources, now_s)
        return [only_ends(failed)] if failed else []

    def _receive(self, now_s: float) -> None:
        for frontend, message in self._frontends.receive():
            match message:
                case AddRequests():
                    self._add(frontend, message.requests, now_s)
                case AbortRequests():
                    self._abort(frontend, message.numbers, now_s)
                case ResetPrefixCache():
                    self._scheduler.reset_prefix_cache()
                    self._recorder.cache_reset(now_s)
                    self._frontends.send(frontend, self._observer.stats(message.ticket))
                case GetSnapshot():
                    self._frontends.send(frontend, self._observer.snapshot(message.ticket, now_s))
                case GetStats():
                    self._frontends.send(frontend, self._observer.stats(message.ticket))

    def _add(self, frontend: Frontend, messages: list[EngineCoreRequest], now_s: float) -> None:
        rejected: list[RejectedRequest] = []
        finished: list[FinishedRequest] = []
        scheduler = self._scheduler
        for message in messages:
            refusal = self._admission.refusal(
                message,
                frontend.requests,
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting + self._num_compiling,
                num_waiting_tokens=scheduler.num_waiting_tokens,
            )
            if refusal is not None:
                logger.debug("%s: request %s refused: %s", frontend.name, message.request_id, refusal.message)
                rejected.append(refusal)
            elif message.max_tokens == 0:
                numbers = range(message.number, message.number + message.n)
                finished += [FinishedRequest(number, "length") for number in numbers]
            else:
                self._admit(frontend, message, now_s)
        if rejected or finished:
            self._frontends.send(frontend, EngineCoreOutputs(finished=finished, rejected=rejected))

    def _admit(self, frontend: Frontend, message: EngineCoreRequest, now_s: float) -> None:
        requests = self._admission.admit(message, frontend.client, now_s)
        frontend.requests |= {request.number: request for request in requests}
        if message.timeout_s is not None:
            self._deadlines.add(requests, now_s + message.timeout_s)
        if message.grammar is None:
            self._enqueue(requests, now_s)
        else:
            assert self._grammars is not None, "refused at the door"
            self._grammars.compile(message.grammar, requests)

    def _enqueue(self, requests: Sequence[Request], now_s: float) -> None:
        for request in requests:
            self._scheduler.add_request(request)
            self._recorder.added(request, now_s)

    @property
    def _num_compiling(self) -> int:
        return 0 if self._grammars is None else self._grammars.num_compiling

    def _follow_grammars(self, now_s: float) -> list[StepOutcome]:
        """Requests whose grammar is compiled enter the queue or are refused; answers whose grammar ends, end."""
        if self._grammars is None:
            return []
        for requests, error in self._grammars.take_compiled():
            live = [request for request in requests if not request.is_finished]
            if live and error:
                self._reject(live, error, now_s)
            else:
                self._enqueue(live, now_s)
        ended: list[Request] = []
        for answer in self._grammars.settle():
            is_complete, error = answer.end
            status = RequestStatus.FINISHED_STOPPED if is_complete else RequestStatus.FINISHED_ERROR
            ended += self._finish([answer.request], status, now_s, error)
        if not ended:
            return []
        self._admission.pace.note(len(ended), now_s)
        return [only_ends(ended)]

    def _reject(self, requests: list[Request], cause: str, now_s: float) -> None:
        first = requests[0]
        self._scheduler.finish_requests(requests, RequestStatus.FINISHED_ERROR, now_s, cause)
        number = first.number - first.sample_index
        refusal = RejectedRequest(number, "invalid", f"the grammar cannot be enforced: {cause}", field="grammar")
        self._frontends.reject(first.client, [request.number for request in requests], refusal)

    def _abort(self, frontend: Frontend, numbers: bytes, now_s: float) -> None:
        requests = [
            request
            for number in np.frombuffer(numbers, "<i4").tolist()
            if (request := frontend.requests.pop(number, None)) is not None
        ]
        if requests:
            self._finish(requests, RequestStatus.FINISHED_ABORTED, now_s)

    def _abort_orphans(self, now_s: float) -> None:
        orphans = self._frontends.take_orphans()
        if orphans:
            self._finish(orphans, RequestStatus.FINISHED_ABORTED, now_s)

    def _end_overdue(self, now_s: float) -> list[StepOutcome]:
        """Requests whose time is over end with the tokens that have arrived, wherever they are."""
        overdue = self._deadlines.take_due(now_s)
        if not overdue:
            return []
        return [only_ends(self._finish(overdue, RequestStatus.FINISHED_TIMED_OUT, now_s))]

    def _finish(self, requests: list[Request], status: RequestStatus, now_s: float, error: str = "") -> list[Request]:
        ended = self._scheduler.finish_requests(requests, status, now_s, error)
        self._recorder.stopped([request for request in ended if request.arrival_order >= 0], now_s)
        return ended

    def _collect(self, now_s: float) -> list[StepOutcome]:
        outcomes = []
        for output in self._executor.collect():
            if output.error:
                logger.error("step %d failed: %s", output.step_id, output.error)
            try:
                outcome = self._scheduler.update_from_output(output, now_s)
            except ProtocolError as error:
                self._executor.refuse(str(error))
                continue
            self._recorder.updated(output, outcome.finished, now_s)
            if outcome.finished:
                self._admission.pace.note(len(outcome.finished), now_s)
            outcomes.append(outcome)
        return outcomes

    def _submit(self, now_s: float) -> None:
        while self._executor.is_ready and self._executor.num_in_flight < self._pipeline_depth:
            step = self._scheduler.schedule(now_s)
            self._recorder.scheduled(step, now_s)
            if step is None:
                return
            self._observer.steps.note(step, now_s)
            self._executor.submit(step, now_s)

    def _check_when_idle(self, sources: list[Any]) -> None:
        """Checks the invariants once when the engine has had no work for a second: many blocks take time."""
        if self._scheduler.has_unfinished:
            self._is_checked = False
        elif not sources and not self._is_checked:
            self._is_checked = True
            try:
                self._scheduler.check_invariants()
            except AssertionError:
                logger.exception("the scheduler's books do not add up; please report this")
