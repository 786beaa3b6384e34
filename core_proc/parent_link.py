"""The connection to whoever started the core: the configuration comes from there, reports go there."""

import os

import zmq

from folovllm.common.errors import EngineStartError, ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.lifecycle import (
    PROTOCOL_VERSION,
    BadFrame,
    ConfigureCore,
    CoreToParent,
    Hello,
    ParentToCore,
)
from folovllm.common.transport import Decoder, connect, encode, new_socket
from folovllm.core_proc.waiter import Waiter

logger = get_logger(__name__)


class ParentLink:
    """The core's side of the connection; `socket` is there once the configuration was asked for."""

    def __init__(self, endpoint: str, name: str, waiter: Waiter) -> None:
        self.endpoint = endpoint
        self.socket: zmq.Socket[bytes] | None = None
        self._name = name
        self._waiter = waiter
        self._decoder: Decoder[ParentToCore] = Decoder(ParentToCore)

    def ask_configuration(self, context: "zmq.Context[zmq.Socket[bytes]]") -> ConfigureCore:
        """Dials, says Hello and waits for the configuration.

        Raises:
            EngineStartError: the parent refused the Hello.
        """
        self.socket = new_socket(context, zmq.DEALER)
        connect(self.socket, self.endpoint)
        self._waiter.add(self.socket)
        self.send(Hello("core", PROTOCOL_VERSION, os.getpid(), self._name))
        while True:
            self._waiter.wait(None)
            for message in self._receive():
                if isinstance(message, ConfigureCore):
                    return message
                raise EngineStartError(f"the parent refused the core's Hello: {message.reason}")

    def pass_over_frames(self) -> None:
        """After the start the parent has nothing to say; what comes is refused."""
        for message in self._receive():
            if isinstance(message, ConfigureCore):
                self._refuse("the core is configured already")
            else:
                logger.warning("the parent says that a frame of ours is bad: %s", message.reason)

    def send(self, message: CoreToParent) -> None:
        if self.socket is not None:
            self.socket.send(encode(message), zmq.NOBLOCK)

    def _receive(self) -> list[ParentToCore]:
        assert self.socket is not None
        messages = []
        while self.socket.poll(0):
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            try:
                messages.append(self._decoder.decode(b"".join(frames)))
            except ProtocolError as error:
                self._refuse(str(error))
        return messages

    def _refuse(self, reason: str) -> None:
        logger.warning("frame of the parent refused: %s", reason)
        self.send(BadFrame(reason))
