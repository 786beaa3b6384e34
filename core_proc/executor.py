"""The worker: its process, its connection, and the steps it was sent and has not answered yet.

The worker has two connections, since a ZeroMQ socket belongs to one thread: its main thread, `worker-0`, says Hello and
receives steps; its output thread, `worker-0/out`, sends what they brought.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from folovllm.common.child_process import ChildProcess
from folovllm.common.errors import EngineDeadError, EngineError, EngineStartError, ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import CoreToWorker, ModelRunnerOutput, SchedulerOutput, WorkerToCore
from folovllm.common.messages.lifecycle import (
    PROTOCOL_VERSION,
    BadFrame,
    ConfigureWorker,
    Failed,
    Hello,
    WorkerReady,
)
from folovllm.common.transport import Decoder, bind, encode, new_socket
from folovllm.core_proc.refusals import Refusals, receive_waiting
from folovllm.core_proc.waiter import Waiter

WORKER_NAME = "worker-0"
STEP_BOUND_S = (
    600.0  # a worker that answers no step for so long is taken for dead; far beyond any step, on a slow CPU too
)
_DEATH_CAUSE_BOUND_S = 1.0  # from a lost connection to the end of the process
_LAST_WORDS_BOUND_MS = 300  # from the end of the process to its last frame's arrival
_INPUT = WORKER_NAME.encode()
_OUTPUT = _INPUT + b"/out"

logger = get_logger(__name__)


class WorkerFailedError(EngineError):
    """The worker said why it cannot go on; `report` is what it said."""

    def __init__(self, report: Failed) -> None:
        super().__init__(f"{report.process}: {report.error_type}: {report.message}")
        self.report = report


class _StepInFlight(NamedTuple):
    step_id: int
    submitted_s: float


class Executor:
    """Submits steps to the worker and collects their results, in the same order."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", runtime_dir: str, worker_module: str) -> None:
        """Starts `python -m worker_module`. Raises OSError where the system cannot start it."""
        self.socket = new_socket(context, zmq.ROUTER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, -1)  # log probabilities of a step may take more, and the worker is ours
        self._refusals = Refusals(self.socket, "worker link")
        endpoint, _ = bind(self.socket, f"ipc://{runtime_dir}/worker")
        self._decoder: Decoder[WorkerToCore] = Decoder(WorkerToCore)
        self._in_flight: deque[_StepInFlight] = deque()
        self._is_refused = False
        self._process = ChildProcess(worker_module, ["--connect", endpoint, "--name", WORKER_NAME], WORKER_NAME)
        logger.debug("started %s as pid %d", worker_module, self._process.pid)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, waiter: Waiter, configure: ConfigureWorker) -> WorkerReady:
        """Tells the worker its configuration and waits until it is ready, has failed or has ended.

        Raises:
            WorkerFailedError: it told why it cannot start.
            EngineStartError: it ended without a word.
        """
        waiter.add(self.socket)
        waiter.add(self._process.sentinel)
        while True:
            sources = waiter.wait(None)
            for identity, frame in receive_waiting(self.socket):
                message = self._decode(identity, frame)
                if isinstance(message, Hello):
                    self._greet(identity, message, configure)
                elif isinstance(message, WorkerReady):
                    return message
                elif isinstance(message, ModelRunnerOutput):
                    self._refuse(identity, "no step was submitted yet")
            if self._process.sentinel in sources:
                self._raise_last_words()
                raise EngineStartError(f"{self._process.exit_cause()} before it was ready")

    def submit(self, step: SchedulerOutput, now_s: float) -> None:
        """Sends one step. Raises EngineDeadError where the worker is gone."""
        try:
            self._send(step)
        except zmq.ZMQError as error:
            raise self._death(f"it cannot be sent to: {error}") from error
        self._in_flight.append(_StepInFlight(step.step_id, now_s))

    def collect(self) -> Iterator[ModelRunnerOutput]:
        """The results that have arrived, oldest step first. Raises WorkerFailedError where the worker gives up."""
        for identity, frame in receive_waiting(self.socket):
            message = self._decode(identity, frame)
            if isinstance(message, ModelRunnerOutput):
                if not self._in_flight or message.step_id != self._in_flight[0].step_id:
                    self._refuse(identity, f"step {message.step_id} is not the one to be answered next")
                    continue
                step = self._in_flight.popleft()
                yield message
                if self._is_refused:
                    self._in_flight.appendleft(step)
                    self._is_refused = False
            elif isinstance(message, Hello | WorkerReady):
                self._refuse(identity, f"{type(message).__name__} comes once, at the start")

    def refuse(self, reason: str) -> None:
        """The result that `collect` gave last cannot be the step's: the worker still owes one."""
        self._is_refused = True
        self._refuse(_OUTPUT, reason)

    def check(self, sources: list[object], now_s: float) -> None:
        """Raises EngineDeadError if the worker has ended or has left a step unanswered for too long."""
        if self._process.sentinel in sources:
            self._raise_last_words()
            raise EngineDeadError(self._process.exit_cause())
        if self._in_flight and now_s - self._in_flight[0].submitted_s > STEP_BOUND_S:
            step_id = self._in_flight[0].step_id
            raise EngineDeadError(f"{WORKER_NAME} has not answered step {step_id} for {STEP_BOUND_S:.0f} s")

    def close(self, grace_s: float) -> None:
        """Stops the worker: in order, after `grace_s` seconds by force."""
        self._process.stop(grace_s)

    def _refuse(self, identity: bytes, reason: str) -> None:
        """Tells the peer; the worker's output thread only sends, so its main thread is told instead."""
        self._refusals.refuse(_INPUT if identity == _OUTPUT else identity, reason)

    def _greet(self, identity: bytes, hello: Hello, configure: ConfigureWorker) -> None:
        if hello.role != "worker" or hello.protocol != PROTOCOL_VERSION:
            self._refuse(
                identity,
                f"expected a worker that speaks protocol {PROTOCOL_VERSION}, got {hello.role!r}, {hello.protocol}",
            )
        elif identity != _INPUT:
            self._refuse(identity, f"a worker's main connection has the identity {WORKER_NAME!r}")
        else:
            self._send(configure)

    def _decode(self, identity: bytes, frame: bytes | None) -> WorkerToCore | None:
        """The message, or None where it was refused or needs no more than a line in the log."""
        if identity not in (_INPUT, _OUTPUT):
            self._refuse(identity, f"only {WORKER_NAME} is served here")
            return None
        if frame is None:
            self._refuse(identity, "a message is one frame")
            return None
        try:
            message = self._decoder.decode(frame)
        except ProtocolError as error:
            self._refuse(identity, str(error))
            return None
        if isinstance(message, Failed):
            raise WorkerFailedError(message)
        if isinstance(message, BadFrame):
            self._refusals.note(identity, f"says that a frame of ours is bad: {message.reason}")
            return None
        return message

    def _send(self, message: CoreToWorker) -> None:
        self.socket.send_multipart([_INPUT, encode(message)], zmq.NOBLOCK)

    def _raise_last_words(self) -> None:
        """Raises WorkerFailedError if the worker, which has ended, said why: the frame may be just behind its end."""
        while self.socket.poll(_LAST_WORDS_BOUND_MS):
            for identity, frame in receive_waiting(self.socket):
                self._decode(identity, frame)

    def _death(self, otherwise: str) -> EngineDeadError:
        """The worker's end in words; `otherwise` where its process goes on."""
        if self._process.wait(_DEATH_CAUSE_BOUND_S):
            self._raise_last_words()
            return EngineDeadError(self._process.exit_cause())
        return EngineDeadError(f"{WORKER_NAME} (pid {self._process.pid}) runs, but {otherwise}")
