"""SIGTERM and SIGINT as something to poll, instead of something that interrupts."""

import signal
import socket
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHELL_SIGNAL_BASE = 128  # a shell reports a program that a signal ended as 128 + the signal's number


class StopRequested(Exception):
    """The process is to end now, in order, with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stop with exit code {exit_code}")
        self.exit_code = exit_code


class StopSignals:
    """From its making on, `fd` becomes readable, and stays so, when SIGTERM or SIGINT arrives.

    Nothing is interrupted: a signal during imports shows no traceback, and one during clean-up does not cut it short.
    """

    def __init__(self) -> None:
        self._arrived, self._write = socket.socketpair()
        self._write.setblocking(False)
        self.fd = self._arrived.fileno()
        # The interpreter writes the number the moment a signal arrives, also just before a poll begins to block.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _pass_over)

    def exit_code(self) -> int:
        """The exit code that tells which signal came first; waits for one. Any thread may ask, and ask again."""
        return _SHELL_SIGNAL_BASE + self._arrived.recv(1, socket.MSG_PEEK)[0]

    def ignore(self) -> None:
        """To be called when all is cleaned up: at the interpreter's end a late signal would change the exit code."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor has the number already."""
