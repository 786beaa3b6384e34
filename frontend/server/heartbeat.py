"""Notices an engine that is alive but stuck, and lets nobody wait for it.

Two ways to be stuck: the core does not answer, or it answers but its worker finishes no step although requests run. The
core replaces such a worker by itself, in half the time: this is for the case that it cannot. In either case new
requests are refused at once, with a 503; those in work are ended when it has lasted too long. As soon as the engine
goes on, so does everything else. An engine that starts a new worker is not stuck: requests wait for it.

`Watch` decides, and takes time as an argument; `Heartbeat` asks the engine and carries out.
"""

import asyncio
import time
from dataclasses import dataclass

from folovllm.common.errors import EngineError
from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import EngineStats
from folovllm.frontend.server.context import ServerContext

logger = get_logger(__name__)

STEP_BOUND_S = 600.0  # twice what the core leaves its worker for one step
PATIENCE = 6.0  # requests in work are ended after so many health time-outs without an answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of the engine.

    Attributes:
        stuck: why no request is taken; "" if all is well.
        hopeless: it has lasted too long; requests in work are to be ended.
    """

    stuck: str = ""
    hopeless: bool = False


class Watch:
    """Beats in, verdicts out."""

    def __init__(self, timeout_s: float, now: float) -> None:
        """Args:
        timeout_s: how long one answer may take.
        now: a monotonic clock's time in seconds.
        """
        self._timeout_s = timeout_s
        self._last_answer = now
        self._num_steps = -1
        self._last_step = now

    def missed(self, now: float) -> Verdict:
        """The core did not answer in time."""
        silent_s = now - self._last_answer
        self._last_step += self._timeout_s  # while the core says nothing, nobody knows about its worker
        return Verdict(
            f"the engine has not answered for {silent_s:.0f} s", hopeless=silent_s >= PATIENCE * self._timeout_s
        )

    def answered(self, stats: EngineStats, now: float) -> Verdict:
        """The core answered."""
        self._last_answer = now
        if stats.num_steps_total != self._num_steps or not stats.num_running:
            self._num_steps, self._last_step = stats.num_steps_total, now
        still_s = now - self._last_step
        if still_s < STEP_BOUND_S:
            return Verdict()
        return Verdict(f"the engine has finished no step for {still_s:.0f} s", hopeless=True)


class Heartbeat:
    """A task that asks the engine again and again, and writes what it finds into the context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._timeout_s = context.options.health_timeout_s
        self._watch = Watch(self._timeout_s, time.monotonic())

    async def run(self) -> None:
        """Until it is cancelled, or the engine has ended."""
        while self._context.llm.failure is None:
            await self.beat()
            await asyncio.sleep(self._timeout_s / 2)
        self._context.stuck = str(self._context.llm.failure)

    async def beat(self) -> None:
        """Asks once, and carries out what follows."""
        verdict = await self._ask()
        if bool(verdict.stuck) != bool(self._context.stuck):
            logger.warning("%s", verdict.stuck or "the engine goes on")
        self._context.stuck = verdict.stuck
        if verdict.hopeless and self._context.num_active:
            logger.error("%s: %d requests are ended", verdict.stuck, self._context.num_active)
            await self._context.abort_all()

    async def _ask(self) -> Verdict:
        try:
            async with asyncio.timeout(self._timeout_s):
                stats = await self._context.llm.get_stats()
        except TimeoutError:
            return self._watch.missed(time.monotonic())
        except EngineError as error:
            return Verdict(str(error))
        return self._watch.answered(stats, time.monotonic())
