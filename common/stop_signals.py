"""SIGTERM and SIGINT as something to poll, instead of something that interrupts."""

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHELL_SIGNAL_BASE = 128  # a shell reports a program that a signal ended as 128 + the signal's number


class StopSignals:
    """From its making on, `fd` becomes readable when SIGTERM or SIGINT arrives; a second signal changes nothing.

    Nothing is interrupted: a signal during imports shows no traceback, and one during clean-up does not cut it short.
    """

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The interpreter writes the number the moment a signal arrives, also just before a poll begins to block.
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _pass_over)

    def exit_code(self) -> int:
        """The exit code that tells which signal came first; to be asked once `fd` is readable."""
        return _SHELL_SIGNAL_BASE + os.read(self.fd, 1)[0]


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor has the number already."""
