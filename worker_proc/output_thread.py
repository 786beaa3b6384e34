"""The worker's second thread: waits for a step's tokens to reach the host and sends them, in the order of the steps.

It has a connection of its own, named as the worker's with "/out" behind, since a ZeroMQ socket belongs to one thread.
Whatever ends it shows at once on a descriptor that the main thread watches: a worker that computes steps and cannot
send what they brought is of no use.
"""

import os
import queue
import threading
from typing import NoReturn, Protocol

import zmq

from folovllm.common.errors import EngineError
from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.common.transport import connect, encode, new_socket

_LINGER_MS = 500  # the last results have so long to leave; a core that is gone must not hold up the end
_MAX_LOGGED_BYTES = 200

logger = get_logger(__name__)


class PendingOutput(Protocol):
    """A step's result that the device may still be computing."""

    step_id: int

    def wait(self) -> ModelRunnerOutput:
        """The result, once it is there. Called in the output thread; raises whatever went wrong on the device."""
        ...


class OutputThread:
    """Made, fed and closed by the main thread. `sentinel`, a descriptor, is readable once the thread has ended."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, name: str) -> None:
        self._queue: queue.SimpleQueue[PendingOutput | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self.sentinel, self._end = os.pipe()
        self._thread = threading.Thread(
            target=self._run, args=(context, endpoint, f"{name}/out"), name="output", daemon=True
        )
        self._thread.start()

    def send(self, output: PendingOutput) -> None:
        """Queues a step's result; returns at once."""
        self._queue.put(output)

    def close(self, bound_s: float) -> bool:
        """Sends what is queued and ends the thread; False if it is still busy after `bound_s` seconds."""
        self._queue.put(None)
        self._thread.join(bound_s)
        if self._thread.is_alive():
            return False
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1
        return True

    def raise_failure(self) -> NoReturn:
        """Raises EngineError with what ended the thread."""
        cause = self._failure
        raise EngineError(f"results can be sent no more: {type(cause).__name__}: {cause}") from cause

    def _run(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, identity: str) -> None:
        try:
            self._send_all(context, endpoint, identity)
        except Exception as error:
            logger.exception("the output thread failed")
            self._failure = error
        finally:
            os.close(self._end)

    def _send_all(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, identity: str) -> None:
        socket = new_socket(context, zmq.DEALER)
        try:
            socket.setsockopt_string(zmq.IDENTITY, identity)
            connect(socket, endpoint)
            while (output := self._queue.get()) is not None:
                socket.send(encode(_wait(output)))
                while socket.poll(0):
                    reply = socket.recv()
                    logger.warning("the core answered a result with %r", reply[:_MAX_LOGGED_BYTES])
        finally:
            socket.close(_LINGER_MS)


def _wait(output: PendingOutput) -> ModelRunnerOutput:
    try:
        return output.wait()
    except Exception as error:
        logger.exception("step %d failed on the device", output.step_id)
        return ModelRunnerOutput(output.step_id, error=f"{type(error).__name__}: {error}")
