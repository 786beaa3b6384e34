"""Frames that are not understood: answered with the reason, logged at a bounded rate, and otherwise without effect."""

import contextlib
from collections.abc import Iterator

import zmq

from folovllm.common.log import BoundedWarnings, get_logger
from folovllm.common.messages.lifecycle import BadFrame
from folovllm.common.transport import encode

_MAX_FRAMES_AT_ONCE = 1024  # so that one peer's flood never keeps the loop from the others
_MAX_REASON_CHARACTERS = 500  # a reason may quote the peer's own bytes

logger = get_logger(__name__)


class Refusals:
    """Refuses frames of one ROUTER socket's peers; `link` names it in the log."""

    def __init__(self, socket: "zmq.Socket[bytes]", link: str) -> None:
        self._socket = socket
        self._log = BoundedWarnings(logger, f"{link} ")

    def refuse(self, identity: bytes, reason: str) -> None:
        """Tells the peer and the log why its frame has no effect."""
        reason = reason[:_MAX_REASON_CHARACTERS]
        self.note(identity, f"frame refused: {reason}")
        with contextlib.suppress(zmq.ZMQError):  # the peer may be gone already
            self._socket.send_multipart([identity, encode(BadFrame(reason))], zmq.NOBLOCK)

    def note(self, identity: bytes, text: str) -> None:
        """Logs a warning about a peer, unless this second has had its lines."""
        self._log.warning(f"{_shown(identity)}: {text[:_MAX_REASON_CHARACTERS]}")


def receive_waiting(socket: "zmq.Socket[bytes]") -> Iterator[tuple[bytes, bytes | None]]:
    """The (identity, frame) pairs that lie in a ROUTER socket now; the frame is None where a message had not one frame.

    At most 1024 of them: the rest makes the socket readable again.
    """
    for _ in range(_MAX_FRAMES_AT_ONCE):
        try:
            identity, *frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        yield identity, frames[0] if len(frames) == 1 else None


def _shown(identity: bytes) -> str:
    return identity.decode() if identity.isascii() and identity.decode().isprintable() else identity.hex()
