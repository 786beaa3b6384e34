"""The start-up table: where the seconds and the bytes of a start went. Pure: it takes readings and gives text."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from folovllm.common.messages.lifecycle import MemoryUse, PhaseTime

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class StartupReport:
    """How an engine's start went.

    Attributes:
        phases: by their begin; phases of different processes overlap.
        memory: bytes by purpose, as the worker reported them.
        wall_s: seconds from the call that started the engine to its readiness.
    """

    phases: Sequence[PhaseTime]
    memory: Sequence[MemoryUse]
    wall_s: float

    @property
    def unexplained_s(self) -> float:
        """Seconds during which no process was in a phase of the table."""
        covered, end = 0.0, 0.0
        for phase in sorted(self.phases, key=lambda phase: phase.start_s):
            begin = max(phase.start_s, end)
            stop = min(phase.start_s + phase.seconds, self.wall_s)
            if stop > begin:
                covered += stop - begin
                end = stop
        return max(0.0, self.wall_s - covered)

    def table(self) -> str:
        """The report as lines of text."""
        rows = [f"{'process':<10} {'phase':<34} {'start s':>8} {'seconds':>8}"]
        for phase in sorted(self.phases, key=lambda phase: (phase.start_s, phase.process)):
            rows.append(f"{phase.process:<10} {phase.phase:<34} {phase.start_s:>8.2f} {phase.seconds:>8.2f}")
        rows.append(f"{'':<10} {'not in any phase above':<34} {'':>8} {self.unexplained_s:>8.2f}")
        rows.append(f"{'':<10} {'ready (phases overlap)':<34} {'':>8} {self.wall_s:>8.2f}")
        if self.memory:
            rows += ["", f"{'purpose':<45} {'memory':>12}"]
            rows += [f"{use.purpose:<45} {shown_bytes(use.num_bytes):>12}" for use in self.memory]
        return "\n".join(rows)


def shown_bytes(count: int) -> str:
    value = float(count)
    for unit in _UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


@dataclass(slots=True)
class Stopwatch:
    """Takes the times of the frontend's own phases, by the wall clock, which all processes of a machine share.

    Attributes:
        began: the start, in seconds since the epoch.
        phases: those that have ended.
    """

    began: float = field(default_factory=time.time)
    phases: list[PhaseTime] = field(default_factory=list)

    def elapsed(self) -> float:
        return time.time() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.elapsed()
        yield
        self.phases.append(PhaseTime("frontend", name, start, self.elapsed() - start))

    def report(self, child_phases: Sequence[PhaseTime], memory: Sequence[MemoryUse]) -> StartupReport:
        """The report of a start that has just ended."""
        return StartupReport(with_python_starts([*self.phases, *child_phases]), list(memory), self.elapsed())


def with_python_starts(phases: Sequence[PhaseTime]) -> list[PhaseTime]:
    """Adds what no process can measure of itself: the time from its creation to its first own reading of the clock.

    A child is created in the last phase (of its parent) that ended before the child's first one began.
    """
    added = []
    for process in dict.fromkeys(phase.process for phase in phases if phase.process != "frontend"):
        first = min(phase.start_s for phase in phases if phase.process == process)
        ends = [phase.start_s + phase.seconds for phase in phases if phase.process != process]
        created = max((end for end in ends if end <= first), default=first)
        if created < first:
            added.append(PhaseTime(process, "start Python", created, first - created))
    return [*phases, *added]
