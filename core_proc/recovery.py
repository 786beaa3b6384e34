"""Carries out what the supervisor decides when a worker has ended.

The scheduler learns that all is lost that the worker held, the executor starts the next one, and until that is ready no
step is made: requests wait, new ones too.
"""

import msgspec

from folovllm.common.errors import EngineDeadError
from folovllm.common.log import get_logger
from folovllm.common.messages.lifecycle import WorkerReady
from folovllm.core_proc.executor import Executor, WorkerFailedError, WorkerLost
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import Scheduler
from folovllm.core_proc.supervisor import Supervisor
from folovllm.core_proc.tracing import Recorder

# The model's files have changed: the next start would find the same. Options have not, and were right for the first
# worker: a ConfigError is about what the machine has left, and the old worker's memory may come back.
_FINAL = "ModelError"

logger = get_logger(__name__)


class Recovery:
    """See the module's head; `executor` is its own."""

    def __init__(self, *, executor: Executor, scheduler: Scheduler, supervisor: Supervisor, recorder: Recorder) -> None:
        self.executor = executor
        self._scheduler = scheduler
        self._supervisor = supervisor
        self._recorder = recorder
        self._lost_s = 0.0

    def look(self, sources: list[object], now_s: float) -> list[Request]:
        """In every turn: what has become of the worker.

        Returns:
            The requests that have failed because they end workers.

        Raises:
            WorkerFailedError, EngineDeadError: the worker has ended and is not replaced.
        """
        event = self.executor.check(sources, now_s)
        if isinstance(event, WorkerReady):
            self._supervisor.ready(now_s)
            logger.warning("a new worker is ready after %.1f s; the requests go on", now_s - self._lost_s)
        elif event is not None:
            return self._replace(event, now_s)
        return []

    def _replace(self, lost: WorkerLost, now_s: float) -> list[Request]:
        in_flight = self._scheduler.lose_worker()
        is_final = lost.report is not None and lost.report.error_type == _FINAL
        decision = self._supervisor.lost(in_flight, now_s, is_final=is_final)
        if decision.give_up:
            raise _end_of_engine(lost, decision.give_up)
        logger.warning(
            "%s; another worker is started, %d requests in flight are computed anew", lost.cause, len(in_flight)
        )
        if decision.suspects:
            names = ", ".join(repr(request.request_id) for request in decision.suspects)
            logger.warning("in flight at repeated ends of a worker, and run alone for a while: %s", names)
        if lost.was_ready:
            self._lost_s = now_s
        self._scheduler.run_alone(decision.suspects)
        self._recorder.worker_lost(decision.suspects, now_s)
        self.executor.restart(now_s)
        return self._fail(decision.failed, lost.cause, now_s)

    def _fail(self, requests: list[Request], cause: str, now_s: float) -> list[Request]:
        if not requests:
            return []
        num_crashes = requests[0].num_crashes
        error = f"it was in flight at {num_crashes} ends of the worker, alone at the last one ({cause})"
        logger.error("request %r fails: %s", requests[0].request_id, error)
        ended = self._scheduler.finish_requests(requests, RequestStatus.FINISHED_ERROR, now_s, error)
        self._recorder.stopped(ended, now_s)
        return ended


def _end_of_engine(lost: WorkerLost, why: str) -> EngineDeadError | WorkerFailedError:
    if lost.report is not None:
        return WorkerFailedError(msgspec.structs.replace(lost.report, message=f"{lost.report.message} ({why})"))
    return EngineDeadError(f"{lost.cause} ({why})")
