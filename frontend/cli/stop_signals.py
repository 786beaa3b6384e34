"""Ends a command in order when a signal asks for it."""

import signal
from types import FrameType

SHELL_SIGNAL_BASE = 128  # shells report 128 + the signal's number


def exit_in_order(*numbers: int) -> None:
    """The first of these signals raises SystemExit(128 + its number); later ones do not cut the clean-up short."""
    for number in numbers:
        signal.signal(number, _exit)


def _exit(number: int, _frame: FrameType | None) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(SHELL_SIGNAL_BASE + number)
