"""One connection from a frontend to a core. It knows sockets and messages, no text.

The core's end is noticed in three ways, whichever comes first: the process sentinel (own engine), the message
EngineFailed, and the loss of the connection (an engine that somebody else started). Used by one thread at a time.
"""

import os
import time
from collections.abc import Container, Iterator, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from folovllm.common.errors import EngineDeadError, ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineFailed,
    EngineSnapshot,
    EngineStats,
    FrontendToCore,
    GetSnapshot,
    GetStats,
    Ping,
    ResetPrefixCache,
    Welcome,
)
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, Hello
from folovllm.common.transport import connect, encode, new_socket
from folovllm.frontend import int32
from folovllm.frontend.core_frames import FrameReader
from folovllm.frontend.engine_process import EngineProcess

logger = get_logger(__name__)

NUMBER_LIMIT = 2**31
_MAX_REQUESTS_PER_FRAME = 256  # the core does nothing else while it admits them
_MAX_PROMPT_BYTES_PER_FRAME = 64 * 2**20  # a frame of over 256 MiB ends the connection (`MAX_FRAME_BYTES`)
_END_WAIT_S = 2.0  # a core that fails hangs up first, then lingers for 0.5 s: its own words say more than a lost line
_LOST = zmq.EVENT_DISCONNECTED
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

Received = EngineCoreOutputs | EngineStats | EngineSnapshot


class CoreClient:
    """A connection that the core has welcomed.

    Attributes:
        welcome: what the core said about itself.
        descriptors: file descriptors to watch for reading, for an event loop; what they announce, `receive_ready`
            takes. They tell of changes only (edge-triggered), and a send can swallow one: call it after sends too.
    """

    def __init__(self, endpoint: str, *, engine: EngineProcess | None = None, timeout_s: float = 10.0) -> None:
        """Dials `endpoint` and waits for the welcome.

        Args:
            endpoint: where the core listens for frontends.
            engine: the core's process, if it is this process's own child.
            timeout_s: how long to wait for the welcome.

        Raises:
            ConfigError: the endpoint is malformed, or its key file is missing.
            EngineDeadError: nobody answers there, or the core refuses this frontend, or it ends.
        """
        self._endpoint = endpoint
        self._engine = engine
        self._failure: EngineDeadError | None = None
        self._frames = FrameReader()
        self._next_number = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self._context, zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(_LOST | _REFUSED)
        try:
            self._poller = self._make_poller()
            connect(self._socket, endpoint)
            self.welcome = self._shake_hands(timeout_s)
        except BaseException:
            self.close()
            raise
        self.descriptors = [*map(_descriptor, (self._socket, self._monitor)), *([engine.sentinel] if engine else [])]

    def _make_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for item in (self._socket, self._monitor, *([self._engine.sentinel] if self._engine else [])):
            poller.register(item, zmq.POLLIN)
        return poller

    def _shake_hands(self, timeout_s: float) -> Welcome:
        self._send(Hello("frontend", PROTOCOL_VERSION, os.getpid(), f"frontend-{os.getpid()}"))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self._poller.poll(max(1, int(left * 1000)))
            frame = self._receive_frame()
            if frame is None:
                self._check_alive()
                continue
            message, _ = self._frames.read(frame)
            if isinstance(message, Welcome):
                return message
            if isinstance(message, BadFrame):
                raise EngineDeadError(f"the engine at {self._endpoint} refuses this frontend: {message.reason}")
            if isinstance(message, EngineFailed):
                raise EngineDeadError(message.message)
        raise EngineDeadError(
            f"no engine answers at {self._endpoint} within {timeout_s:g} s; start one with `folovllm engine MODEL "
            f"--listen {self._endpoint}`, or check the address"
        )

    def allocate(self, count: int, live: Container[int]) -> int:
        """The first of `count` consecutive numbers that no live request has."""
        first = self._next_number
        while True:
            if first + count > NUMBER_LIMIT:
                first = 0
            taken = [number for number in range(first, first + count) if number in live]
            if not taken:
                self._next_number = first + count
                return first
            first = taken[-1] + 1

    def add(self, requests: Sequence[EngineCoreRequest]) -> None:
        """Sends new requests; their outcome comes with `receive`."""
        for portion in frames_of(requests):
            self._send(AddRequests(portion))

    def abort(self, numbers: Sequence[int]) -> None:
        """Tells the core to forget these answers."""
        if numbers:
            self._send(AbortRequests(int32.pack(numbers)))

    def ask_stats(self, ticket: int) -> None:
        """Asks for EngineStats, which come with `receive` and echo the ticket."""
        self._send(GetStats(ticket))

    def ask_snapshot(self, ticket: int) -> None:
        """Asks for an EngineSnapshot, which comes with `receive` and echoes the ticket."""
        self._send(GetSnapshot(ticket))

    def reset_prefix_cache(self, ticket: int) -> None:
        """Has the core forget what is cached; EngineStats that echo the ticket come once it has."""
        self._send(ResetPrefixCache(ticket))

    def receive(self, timeout_s: float | None = None) -> list[Received]:
        """Waits until something comes; empty if nothing did in time. Raises EngineDeadError once the core ends."""
        if self._failure is None:
            self._poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))
        return self.receive_ready()

    def receive_ready(self, limit: int | None = None) -> list[Received]:
        """All that is there, without waiting.

        Args:
            limit: take no more than this; whoever gets so many calls again, as no descriptor may announce the rest.

        Raises:
            EngineDeadError: the core has ended, or the two no longer understand each other (`give_up`), and nothing it
                sent before is left to take.
        """
        received: list[Received] = []
        while len(received) != limit and self._failure is None and (frame := self._receive_frame()) is not None:
            try:
                message = self._read(frame)
            except ProtocolError as error:
                self.give_up(error)
            else:
                received += [] if message is None else [message]
        if not received:
            self._check_alive()
        return received

    def _read(self, frame: bytes) -> Received | None:
        """What the frame brings; a request whose own entry in it is malformed is ended, here and in the core."""
        message, ended = self._frames.read(frame)
        self.abort(ended)
        if isinstance(message, Received):
            return message
        if isinstance(message, EngineFailed):
            self._failure = EngineDeadError(message.message)
        elif isinstance(message, BadFrame):
            raise ProtocolError(f"the core refused a frame of this frontend: {message.reason}")
        elif not isinstance(message, Ping):
            raise ProtocolError(f"the core sent an unexpected {type(message).__name__}")
        return None

    def give_up(self, error: ProtocolError) -> EngineDeadError:
        """Ends the connection over a fault that no single request is to blame for; whoever uses it closes it.

        Going on would leave requests waiting for tokens that were in the frame, or for an answer to one of ours.
        """
        logger.error("the connection to the engine is given up: %s", error)
        self._failure = EngineDeadError(f"the connection to the engine was given up, as it makes no sense: {error}")
        self._failure.__cause__ = error
        return self._failure

    def _check_alive(self) -> None:
        """Raises the cause if the core has ended."""
        if self._engine is not None:
            self._failure = self._failure or self._engine.failure()
        self._failure = self._failure or self._connection_failure()
        if self._failure is not None:
            raise self._failure

    def _connection_failure(self) -> EngineDeadError | None:
        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] & _REFUSED:
                return EngineDeadError(f"the engine at {self._endpoint} does not accept this frontend's key")
            if self._engine is None:
                return EngineDeadError(f"the connection to the engine at {self._endpoint} was lost")
            self._engine.wait_for_end(_END_WAIT_S)  # a core that ends hangs up a moment before
            return self._engine.failure() or EngineDeadError("the engine's core process stopped answering")
        return None

    def _receive_frame(self) -> bytes | None:
        try:
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _send(self, message: FrontendToCore) -> None:
        if self._socket.closed:
            raise self._failure or EngineDeadError("the connection to the engine is closed")
        self._socket.send(encode(message))

    def close(self) -> None:
        """Hangs up; the core drops this frontend's requests. May be called again."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close()
            self._context.term()


def frames_of(requests: Sequence[EngineCoreRequest]) -> Iterator[list[EngineCoreRequest]]:
    """Requests in order, as many at a time as one frame may hold; at least one."""
    portion: list[EngineCoreRequest] = []
    num_bytes = 0
    for request in requests:
        size = len(request.prompt_token_ids)
        if len(portion) == _MAX_REQUESTS_PER_FRAME or (portion and num_bytes + size > _MAX_PROMPT_BYTES_PER_FRAME):
            yield portion
            portion, num_bytes = [], 0
        portion.append(request)
        num_bytes += size
    if portion:
        yield portion


def _descriptor(socket: "zmq.Socket[bytes]") -> int:
    number = socket.getsockopt(zmq.FD)
    assert isinstance(number, int)
    return number
