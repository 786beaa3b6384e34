"""One place where the core waits: for frames, for its worker's end, for its own end, whichever comes first."""

from typing import Any

import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.stop_signals import StopRequested, StopSignals


class Waiter:
    """A poller that raises StopRequested when the parent is gone (exit code 0) or a signal came."""

    def __init__(self, watch: ParentWatch | None, signals: StopSignals) -> None:
        self._poller = zmq.Poller()
        self._parent_fd = -1 if watch is None else watch.fd
        self._signals = signals
        self._poller.register(signals.fd, zmq.POLLIN)
        if watch is not None:
            self._poller.register(watch.fd, zmq.POLLIN)

    def add(self, source: "zmq.Socket[bytes] | int") -> None:
        """Adds a socket or a file descriptor to what is waited for."""
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: "zmq.Socket[bytes] | int") -> None:
        """It is waited for no longer."""
        self._poller.unregister(source)

    def wait(self, timeout_ms: int | None) -> list[Any]:
        """The sources with something to read; empty after `timeout_ms`, None waits without bound."""
        ready = [source for source, _ in self._poller.poll(timeout_ms)]
        if self._parent_fd in ready:
            raise StopRequested(0)
        if self._signals.fd in ready:
            raise StopRequested(self._signals.exit_code())
        return ready
