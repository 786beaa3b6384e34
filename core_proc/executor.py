"""The worker that takes steps, the steps it has not answered yet, and the next worker once it has ended.

A worker ends by itself, is ended because it said that it cannot go on, or because it hangs. Either way its process is
gone before the next one starts, since only then its memory is free, and nothing here waits for it: `check` says when.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
import zmq

from folovllm.common.errors import EngineError, EngineStartError
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker, Failed, WorkerReady
from folovllm.core_proc.waiter import Waiter
from folovllm.core_proc.worker_link import OUTPUT, WORKER_NAME, WorkerLink

STEP_BOUND_S: Final = (
    300.0  # of one step: 2048 tokens of a prompt, with a model that is large for its CPU, take minutes
)
_START_BOUND: Final = 4.0  # times as long as the first worker's start, and never less than a step's bound
_GRACE_S: Final = 2.0  # from a worker's report that it cannot go on, or its connection's end, to SIGKILL
_LAST_WORDS_S: Final = 0.3  # from the end of the process to its last frame's arrival
_LAST_RESULTS_S: Final = 0.05  # the same for a process that was killed, and has no words
_ENDING_TICK_MS: Final = 50
_TICK_MS: Final = 1000


class WorkerFailedError(EngineError):
    """The worker said why it cannot go on; `report` is what it said."""

    def __init__(self, report: Failed) -> None:
        super().__init__(_words(report))
        self.report = report


class WorkerLost(NamedTuple):
    """A worker has ended.

    Attributes:
        cause: why, in words.
        report: its own words, if it had any.
        was_ready: False: it ended before it took steps.
    """

    cause: str
    report: Failed | None
    was_ready: bool


class _Ending(NamedTuple):
    """A worker that is to end, or has ended at `ended_s`; `fault` is what it is ended for, "" if it ends by itself."""

    fault: str
    kill_s: float
    ended_s: float | None = None


class Executor:
    """Submits steps to the worker and collects their results, in the same order."""

    def __init__(self, first_worker: WorkerLink, step_bound_s: float = STEP_BOUND_S) -> None:
        """`first_worker` has just been started; it and those that follow it are the executor's to close."""
        self._link = first_worker
        self._step_bound_s = step_bound_s
        self._start_bound_s = step_bound_s
        self._in_flight: deque[int] = deque()  # step ids
        self._owed_since_s: float | None = None  # the oldest of them; None until `check` knows
        self._is_refused = False
        self._ending: _Ending | None = None
        self._started_s = 0.0
        self._is_told_ready = True
        self._waiter: Waiter | None = None
        self._configure: ConfigureWorker | None = None

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """To be waited for: `collect` when it is readable."""
        return self._link.socket

    @property
    def num_restarts(self) -> int:
        return self._link.number

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def is_ready(self) -> bool:
        """Whether steps can be submitted: not while a worker ends, nor before the next one is ready."""
        return self._ending is None and self._link.ready is not None

    @property
    def tick_ms(self) -> int | None:
        """How often `check` must be called, whatever happens; None: when a source of the waiter is readable."""
        if self._ending is not None:
            return _ENDING_TICK_MS
        return _TICK_MS if self._in_flight or not self.is_ready else None

    def start(self, waiter: Waiter, configure: ConfigureWorker) -> WorkerReady:
        """Tells the first worker its configuration and waits until it is ready, has failed or has ended.

        Raises:
            WorkerFailedError: it told why it cannot start.
            EngineStartError: it ended without a word.
        """
        begun_s = time.monotonic()
        self._waiter, self._configure = waiter, configure
        link = self._link
        waiter.add(link.socket)
        waiter.add(link.process.sentinel)
        while link.ready is None:
            sources = waiter.wait(None)
            self._refuse_early_results()
            if link.process.sentinel in sources:
                while link.report is None and link.socket.poll(int(1000 * _LAST_WORDS_S)):
                    self._refuse_early_results()
            if link.report is not None:
                raise WorkerFailedError(link.report)
            if link.process.sentinel in sources:
                raise EngineStartError(f"{link.process.exit_cause()} before it was ready")
        # The books of the scheduler are for this many blocks: the next worker is not to count for itself.
        config = msgspec.structs.replace(
            configure.config, num_gpu_blocks_override=link.ready.num_blocks, kv_cache_memory_gb=None
        )
        self._configure = msgspec.structs.replace(configure, config=config, started_at=0.0)
        self._start_bound_s = max(self._step_bound_s, _START_BOUND * (time.monotonic() - begun_s))
        return link.ready

    def submit(self, step: SchedulerOutput, now_s: float) -> None:
        """Sends one step; a worker that is gone shows in `check`."""
        if not self._in_flight:
            self._owed_since_s = now_s
        self._in_flight.append(step.step_id)
        try:
            self._link.send(step)
        except zmq.ZMQError as error:
            self._end(f"{WORKER_NAME} (pid {self._link.process.pid}) runs, but it cannot be sent to: {error}", now_s)

    def collect(self) -> Iterator[ModelRunnerOutput]:
        """The results that have arrived, oldest step first; what else the worker says takes effect, too."""
        assert self._configure is not None, "not started"
        for identity, output in self._link.receive(self._configure):
            if not self._in_flight or output.step_id != self._in_flight[0]:
                self._link.refuse(identity, f"step {output.step_id} is not the one to be answered next")
                continue
            self._in_flight.popleft()
            yield output
            if self._is_refused:
                self._in_flight.appendleft(output.step_id)
                self._is_refused = False
            else:
                self._owed_since_s = None

    def refuse(self, reason: str) -> None:
        """The result that `collect` gave last cannot be the step's: the worker still owes one."""
        self._is_refused = True
        self._link.refuse(OUTPUT, reason)

    def check(self, sources: list[object], now_s: float) -> WorkerLost | WorkerReady | None:
        """What has become of the worker since the last call: gone, or (a new one) ready. Ends one that hangs."""
        link = self._link
        if link.process.sentinel in sources:
            self._forget_sentinel()
            ending = self._ending or _Ending("", now_s)
            self._ending = ending._replace(ended_s=now_s)
            return None  # its last results may lie in the socket
        if self._ending is not None:
            return self._follow_end(self._ending, now_s)
        if fault := self._fault(now_s):
            if link.report is not None:
                link.process.ask_to_stop()
            self._end(fault, now_s, grace_s=0.0 if link.report is None else _GRACE_S)
        elif link.ready is not None and not self._is_told_ready:
            self._is_told_ready = True
            return link.ready
        return None

    def restart(self, now_s: float) -> None:
        """Starts another worker in place of the one that is lost. Raises OSError where the system cannot."""
        assert self._waiter is not None, "not started"
        self._waiter.remove(self._link.socket)
        self._link.close(0.0)
        self._in_flight.clear()
        self._ending = None
        self._started_s, self._is_told_ready = now_s, False
        self._link = self._link.successor()
        self._waiter.add(self._link.socket)
        self._waiter.add(self._link.process.sentinel)

    def close(self, grace_s: float) -> None:
        """Stops the worker: in order, after `grace_s` seconds by force."""
        self._link.close(grace_s)

    def _fault(self, now_s: float) -> str:
        """Why the worker must be ended; "" if it need not be."""
        if self._link.report is not None:
            return _words(self._link.report)
        if self._link.ready is None and now_s - self._started_s > self._start_bound_s:
            return f"{WORKER_NAME} was not ready after {self._start_bound_s:.0f} s"
        if self._owed_since_s is None:  # the worker has begun with it when it had done the one before
            self._owed_since_s = now_s
        if self._in_flight and now_s - self._owed_since_s > self._step_bound_s:
            return f"{WORKER_NAME} has not answered step {self._in_flight[0]} for {self._step_bound_s:.0f} s"
        return ""

    def _end(self, fault: str, now_s: float, grace_s: float = _GRACE_S) -> None:
        if self._ending is None:
            self._ending = _Ending(fault, now_s + grace_s)
            self._follow_end(self._ending, now_s)

    def _follow_end(self, ending: _Ending, now_s: float) -> WorkerLost | None:
        link = self._link
        if ending.ended_s is None:
            if now_s >= ending.kill_s:
                link.process.kill()
            return None
        was_killed = (link.process.exit_code() or 0) < 0
        patience_s = _LAST_RESULTS_S if was_killed or link.report is not None else _LAST_WORDS_S
        if now_s - ending.ended_s < patience_s:
            return None
        cause = ending.fault if ending.fault and ending.ended_s >= ending.kill_s else link.process.exit_cause()
        return WorkerLost(cause if link.report is None else _words(link.report), link.report, link.ready is not None)

    def _refuse_early_results(self) -> None:
        assert not list(self.collect()), "nothing was submitted"

    def _forget_sentinel(self) -> None:
        """It stays readable: the waiter would never wait again."""
        assert self._waiter is not None, "not started"
        self._waiter.remove(self._link.process.sentinel)


def _words(report: Failed) -> str:
    return f"{report.process}: {report.error_type}: {report.message}"
