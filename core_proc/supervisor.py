"""What follows from the end of a worker: another one, and which requests are to blame. Pure: events in, decisions out.

* A worker that ends is replaced, at most `max_restarts` times in a row. A worker that has served for ten minutes begins
  a new row: one crash a day must not end an engine in the third week, and a start that takes minutes must not make a
  crash at every step look rare.
* A request that was in flight at two ends, at the same place, is suspected, and runs alone (`isolation`); if it is in
  flight, alone, at a third one, it fails, and nobody else. One end proves nothing: most have causes outside.
* A worker that cannot start because the model's files are not what they were would not start the next time either.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

SERVED_LONG_S: Final = 600.0  # a worker that has served for so long was no failure
NUM_CRASHES_OF_A_SUSPECT: Final = 2


class InFlight(Protocol):
    """A request that was in flight when a worker ended; `num_crashes` counts that end, and others at the same place."""

    @property
    def num_crashes(self) -> int: ...


R = TypeVar("R", bound=InFlight)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision(Generic[R]):
    """What to do.

    Attributes:
        give_up: why there is no other worker; "" starts one.
        suspects: run alone, in this order.
        failed: end with an error.
    """

    give_up: str = ""
    suspects: list[R] = dataclasses.field(default_factory=list)
    failed: list[R] = dataclasses.field(default_factory=list)


class Supervisor:
    """Counts ends and decides. All times are seconds on the caller's clock.

    Args:
        max_restarts: how many workers in a row may be replaced; 0: none.
        now_s: when the first worker was ready.
    """

    def __init__(self, max_restarts: int, now_s: float) -> None:
        self._max_restarts = max_restarts
        self._num_in_a_row = 0
        self._ready_s: float | None = now_s  # None while one starts

    def ready(self, now_s: float) -> None:
        """The new worker takes steps."""
        self._ready_s = now_s

    def lost(self, in_flight: Sequence[R], now_s: float, *, is_final: bool = False) -> Decision[R]:
        """The worker has ended, or did not come to be ready.

        Args:
            in_flight: who was in the steps that it had not answered.
            now_s: when.
            is_final: the start failed for a cause that does not go away, such as a missing file.
        """
        was_ready = self._ready_s is not None
        if self._ready_s is not None and now_s - self._ready_s >= SERVED_LONG_S:
            self._num_in_a_row = 0
        self._ready_s = None
        self._num_in_a_row += 1
        if is_final and not was_ready:
            return Decision("a new worker cannot start")
        if self._num_in_a_row > self._max_restarts:
            return Decision(self._too_many())
        suspects = [request for request in in_flight if request.num_crashes >= NUM_CRASHES_OF_A_SUSPECT]
        if len(in_flight) == 1 and in_flight[0].num_crashes > NUM_CRASHES_OF_A_SUSPECT:
            # What it did is not counted against the engine: four such requests in ten minutes would end it for all.
            self._num_in_a_row = max(self._num_in_a_row - in_flight[0].num_crashes, 0)
            return Decision(failed=suspects)
        return Decision(suspects=suspects)

    def _too_many(self) -> str:
        if not self._max_restarts:
            return "max_worker_restarts=0: it is not replaced"
        return f"{self._num_in_a_row} workers in a row have ended, and max_worker_restarts={self._max_restarts}"
