"""The core's ROUTER socket towards frontends, as lists of frames."""

import zmq

from folovllm.common.messages.frontend_core import CoreToFrontend
from folovllm.common.transport import Decoder


class FakeRouter:
    """`incoming` is what peers have sent, `sent` what they got; peers in `gone` cannot be reached, those in `full` do
    not read."""

    def __init__(self) -> None:
        self.incoming: list[list[bytes]] = []
        self.sent: list[tuple[bytes, CoreToFrontend]] = []
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self._decoder: Decoder[CoreToFrontend] = Decoder(CoreToFrontend)

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.incoming:
            raise zmq.Again
        return self.incoming.pop(0)

    def send_multipart(self, frames: list[bytes], _flags: int) -> None:
        identity, frame = frames
        if identity in self.gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        if identity in self.full:
            raise zmq.Again
        self.sent.append((identity, self._decoder.decode(frame)))

    def take(self) -> list[tuple[bytes, CoreToFrontend]]:
        sent, self.sent = self.sent, []
        return sent
