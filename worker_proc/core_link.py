"""The worker's main connection to the core: Hello and configuration, then steps; all the while it watches for the end.

A frame that is no valid message, or no message for this phase, is answered with its reason, logged at a bounded rate,
and has no other effect. It belongs to the main thread; results leave through the output thread's own connection.
"""

import os
import traceback
from collections.abc import Callable
from typing import NoReturn

import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.errors import EngineStartError, ProtocolError
from folovllm.common.log import BoundedWarnings, get_logger
from folovllm.common.messages.core_worker import CoreToWorker, SchedulerOutput, WorkerToCore
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, ConfigureWorker, Failed, Hello
from folovllm.common.stop_signals import StopRequested, StopSignals
from folovllm.common.transport import Decoder, connect, encode, new_socket

_LINGER_MS = 500  # a last report has so long to leave; a core that is gone must not hold up the end
_MAX_REASON_CHARACTERS = 500  # a reason may quote the frame's own bytes

logger = get_logger(__name__)


class CoreLink:
    """See the module's head. Every call that waits raises StopRequested when the core is gone (0) or a signal came."""

    def __init__(self, endpoint: str, name: str, signals: StopSignals, watch: ParentWatch | None) -> None:
        self.endpoint = endpoint
        self.name = name
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self.context, zmq.DEALER)
        self._socket.setsockopt_string(zmq.IDENTITY, name)
        self._decoder: Decoder[CoreToWorker] = Decoder(CoreToWorker)
        self._log = BoundedWarnings(logger)
        self._signals = signals
        self._parent_fd = -1 if watch is None else watch.fd
        self._watched: dict[int, Callable[[], NoReturn]] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(signals.fd, zmq.POLLIN)
        if watch is not None:
            self._poller.register(watch.fd, zmq.POLLIN)

    def say_hello(self) -> None:
        """Dials and says Hello, which asks for the configuration. Raises ConfigError where the endpoint is wrong."""
        connect(self._socket, self.endpoint)
        self.send(Hello("worker", PROTOCOL_VERSION, os.getpid(), self.name))

    def await_configuration(self) -> ConfigureWorker:
        """Waits for the answer to the Hello. Raises EngineStartError where the core refused it."""
        while True:
            message = self._receive()
            if isinstance(message, ConfigureWorker):
                return message
            if isinstance(message, BadFrame):
                raise EngineStartError(f"the core refused the worker's Hello: {message.reason}")
            self._refuse("the worker is not configured yet, no step can be computed")

    def receive_step(self, timeout_ms: int | None = None) -> SchedulerOutput | None:
        """Waits for the next step; None if no message has come for so long."""
        while True:
            message = self._receive(timeout_ms)
            if message is None:
                return None
            if isinstance(message, SchedulerOutput):
                return message
            if isinstance(message, BadFrame):
                self._log.warning(f"the core says that a frame of ours is bad: {message.reason}")
            else:
                self._refuse("the worker is configured already")

    def watch(self, fd: int, on_readable: Callable[[], NoReturn]) -> None:
        """From now on every wait ends as `on_readable` says as soon as `fd` is readable."""
        self._watched[fd] = on_readable
        self._poller.register(fd, zmq.POLLIN)

    def check_stop(self) -> None:
        """Raises StopRequested if it is time to end; does not wait."""
        self._wait(0)

    def send(self, message: WorkerToCore) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)

    def report(self, error: Exception) -> None:
        """Sends a Failed that tells `error`."""
        text = "".join(traceback.format_exception(error))
        self.send(Failed(self.name, type(error).__name__, str(error), text))

    def close(self) -> None:
        self._socket.close(_LINGER_MS)
        self.context.term()

    def _wait(self, timeout_ms: int | None) -> bool:
        """Whether anything came within the time."""
        ready = [source for source, _ in self._poller.poll(timeout_ms)]
        if self._parent_fd in ready:
            raise StopRequested(0)
        if self._signals.fd in ready:
            raise StopRequested(self._signals.exit_code())
        for fd, on_readable in self._watched.items():
            if fd in ready:
                on_readable()
        return bool(ready)

    def _receive(self, timeout_ms: int | None = None) -> CoreToWorker | None:
        """Waits for the next valid message; refuses what comes before it. None if none has come for so long."""
        while True:
            if not self._wait(timeout_ms):
                return None
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"a message is one frame, not {len(frames)}")
                return self._decoder.decode(frames[0])
            except ProtocolError as error:
                self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        reason = reason[:_MAX_REASON_CHARACTERS]
        self._log.warning(f"frame of the core refused: {reason}")
        self.send(BadFrame(reason))
