"""Lines of a file or a pipe, one at a time, in bounded memory and without a thread.

A thread that waits in `read` for a pipe could not be ended by Ctrl-C. So a pipe, a socket or a terminal is read when
the event loop says that there is something; anything else always has something.
"""

import asyncio
import os
import stat
from typing import NamedTuple

_PIECE = 65_536


class Line(NamedTuple):
    """A line without its end; `data` is None for one that was too long, and passed over."""

    number: int
    data: bytes | None


class LineReader:
    """Reads lines from a descriptor; several tasks may ask for the next one."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        """Args:
        fd: to read from; the caller closes it.
        max_bytes: of one line; longer ones are told and passed over.
        """
        self._fd = fd
        self._max_bytes = max_bytes
        self._waits = _can_wait(fd)
        self._rest = bytearray()
        self._number = 0
        self._ended = False
        self._turn = asyncio.Lock()

    async def next(self) -> Line | None:
        """The next line that is not blank; None at the end."""
        async with self._turn:
            while (line := await self._line()) is not None:
                self._number += 1
                if line.data is None or line.data.strip():
                    return line
            return None

    async def _line(self) -> Line | None:
        searched, is_too_long = 0, False
        while True:
            end = self._rest.find(b"\n", searched)
            if end >= 0 or (self._ended and self._rest):
                length = end if end >= 0 else len(self._rest)
                data = bytes(self._rest[:length])
                del self._rest[: length + 1]
                return Line(self._number + 1, None if is_too_long or length > self._max_bytes else data)
            if self._ended:
                return Line(self._number + 1, None) if is_too_long else None
            if len(self._rest) > self._max_bytes:
                is_too_long = True
                self._rest.clear()
            searched = len(self._rest)
            self._take(await self._piece())

    def _take(self, piece: bytes) -> None:
        self._ended = not piece
        self._rest += piece

    async def _piece(self) -> bytes:
        if self._waits:
            loop = asyncio.get_running_loop()
            is_ready = asyncio.Event()
            loop.add_reader(self._fd, is_ready.set)
            try:
                await is_ready.wait()
            finally:
                loop.remove_reader(self._fd)
        return os.read(self._fd, _PIECE)


def _can_wait(fd: int) -> bool:
    """Whether the event loop can watch it; regular files and devices such as /dev/null it cannot."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)
