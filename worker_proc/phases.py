"""The worker's rows of the start-up table: where the seconds of a start went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from folovllm.common.log import get_logger
from folovllm.common.messages.lifecycle import PhaseTime

logger = get_logger(__name__)


class Phases:
    """The rows of the start-up table; `origin` is when the engine's start began, in seconds since 1970."""

    def __init__(self, process: str, origin: float) -> None:
        self._process = process
        self._origin = origin
        self.rows: list[PhaseTime] = []

    def count_from(self, origin: float) -> None:
        """Makes this the origin, of the rows that are there too."""
        moved_by = self._origin - origin
        self._origin = origin
        self.rows[:] = [msgspec.structs.replace(row, start_s=row.start_s + moved_by) for row in self.rows]

    def add(self, phase: str, begun: float) -> None:
        """A phase from `begun` until now."""
        self.rows.append(PhaseTime(self._process, phase, begun - self._origin, time.time() - begun))

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        begun = time.time()
        yield
        self.add(phase, begun)
        logger.debug("%s: %.2f s", phase, self.rows[-1].seconds)
