"""One worker: its process and its connection, from the start of both to the end of both.

The worker has two connections, since a ZeroMQ socket belongs to one thread: its main thread, `worker-0`, says Hello and
receives steps; its output thread, `worker-0/out`, sends what they brought. They dial an endpoint that no other worker
is told of: what a worker that was given up still has on its way reaches nobody.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Final

import zmq

from folovllm.common.child_process import ChildProcess
from folovllm.common.errors import ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import CoreToWorker, ModelRunnerOutput, WorkerToCore
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

WORKER_NAME: Final = "worker-0"
INPUT: Final = WORKER_NAME.encode()
OUTPUT: Final = INPUT + b"/out"

logger = get_logger(__name__)


class WorkerLink:
    """See the module's head.

    Attributes:
        number: how many workers the engine had before this one.
        socket: to be waited for.
        process: to be waited for, by its sentinel.
        ready: what the worker said when it was; None before.
        report: why it cannot go on, in its own words; None as a rule.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", folder: pathlib.Path, worker_module: str, number: int = 0
    ) -> None:
        """Starts `python -m worker_module`, the engine's worker number `number`, which dials a socket in `folder`.

        Raises OSError where the system cannot start it.
        """
        self.number = number
        self._folder = folder
        self._worker_module = worker_module
        self._is_configured = False
        self.ready: WorkerReady | None = None
        self.report: Failed | None = None
        self.socket = new_socket(context, zmq.ROUTER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, -1)  # log probabilities of a step may take more, and the worker is ours
        self._refusals = Refusals(self.socket, "worker link")
        self._decoder: Decoder[WorkerToCore] = Decoder(WorkerToCore)
        bound, _ = bind(self.socket, f"ipc://{folder}/worker-{number}")
        self.process = ChildProcess(worker_module, ["--connect", bound, "--name", WORKER_NAME], WORKER_NAME)
        logger.debug("started %s as pid %d", worker_module, self.process.pid)

    def successor(self) -> "WorkerLink":
        """Another worker of the same kind, started now. Raises OSError where the system cannot start it."""
        return WorkerLink(self.socket.context, self._folder, self._worker_module, self.number + 1)

    def receive(self, configure: ConfigureWorker) -> Iterator[tuple[bytes, ModelRunnerOutput]]:
        """The results that have arrived, and on which connection; everything else takes effect here."""
        for identity, frame in receive_waiting(self.socket):
            message = self._decode(identity, frame)
            match message:
                case ModelRunnerOutput():
                    yield identity, message
                case Hello() if self.ready is None:
                    self._greet(identity, message, configure)
                case WorkerReady() if self.ready is None:
                    self.ready = message
                case Hello() | WorkerReady():
                    self.refuse(identity, f"{type(message).__name__} comes once, at the start")
                case Failed():
                    self.report = message
                case BadFrame():
                    self._refusals.note(identity, f"says that a frame of ours is bad: {message.reason}")

    def send(self, message: CoreToWorker) -> None:
        """Raises zmq.ZMQError where the worker cannot be reached."""
        self.socket.send_multipart([INPUT, encode(message)], zmq.NOBLOCK)

    def refuse(self, identity: bytes, reason: str) -> None:
        """Tells the peer; the worker's output thread only sends, so its main thread is told instead."""
        self._refusals.refuse(INPUT if identity == OUTPUT else identity, reason)

    def close(self, grace_s: float) -> None:
        """Stops the process, in order, after `grace_s` seconds by force, and hangs up.

        One that was told nothing yet has nothing to put in order, and imports torch, deaf, for a second or two.
        """
        self.process.stop(grace_s if self._is_configured else 0.0)
        self.socket.close(0)

    def _greet(self, identity: bytes, hello: Hello, configure: ConfigureWorker) -> None:
        if hello.role != "worker" or hello.protocol != PROTOCOL_VERSION:
            self.refuse(
                identity,
                f"expected a worker that speaks protocol {PROTOCOL_VERSION}, got {hello.role!r}, {hello.protocol}",
            )
        elif identity != INPUT:
            self.refuse(identity, f"a worker's main connection has the identity {WORKER_NAME!r}")
        else:
            with contextlib.suppress(zmq.ZMQError):  # gone already: its process's end will show
                self.send(configure)
                self._is_configured = True

    def _decode(self, identity: bytes, frame: bytes | None) -> WorkerToCore | None:
        """The message, or None where it was refused."""
        if identity not in (INPUT, OUTPUT):
            self.refuse(identity, f"only {WORKER_NAME} is served here")
            return None
        if frame is None:
            self.refuse(identity, "a message is one frame")
            return None
        try:
            return self._decoder.decode(frame)
        except ProtocolError as error:
            self.refuse(identity, str(error))
            return None
