"""What the engine tells about itself: figures and a snapshot on request, a line in the log now and then, a trace."""

from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import EngineSnapshot, EngineStats
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.executor import Executor
from folovllm.core_proc.frontends import Frontends
from folovllm.core_proc.scheduler import Scheduler
from folovllm.core_proc.snapshot import StepHistory, take_snapshot
from folovllm.core_proc.state_log import StateLog
from folovllm.core_proc.tracing import NoRecorder, Recorder, Sink, TraceRecorder

logger = get_logger(__name__)


class Observer:
    """Looks at an engine's parts and changes none of them.

    `recorder` is to be told of the scheduler's doors, `steps` of each step that is submitted.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        pool: BlockPool,
        frontends: Frontends,
        executor: Executor,
        log_interval_s: float = 0.0,
        sink: Sink | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._frontends = frontends
        self._executor = executor
        self.steps = StepHistory()
        self._state_log = StateLog(log_interval_s)
        self.recorder: Recorder = NoRecorder() if sink is None else TraceRecorder(scheduler, pool, sink)

    def look(self, now_s: float) -> None:
        """Once in every turn: logs a line if one is due, and lets others read the trace up to here."""
        self.recorder.flush(now_s)
        if self._state_log.is_due(now_s, self._scheduler.has_unfinished):
            logger.info("%s", self._state_log.line(now_s, self.stats(0)))

    def snapshot(self, ticket: int, now_s: float) -> EngineSnapshot:
        """The engine from inside, as the answer to the question with this ticket."""
        return take_snapshot(self.stats(ticket), self._scheduler, self._pool, self.steps, now_s)

    def stats(self, ticket: int) -> EngineStats:
        """The engine's state now, as the answer to the question with this ticket."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            ticket=ticket,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=self._pool.num_free,
            num_blocks=self._pool.num_usable,
            num_cached_tokens_total=counters.num_cached_tokens,
            num_preemptions_total=counters.num_preemptions,
            num_lost_tokens_total=counters.num_lost_tokens,
            num_prompt_tokens_total=counters.num_prompt_tokens,
            num_output_tokens_total=counters.num_output_tokens,
            num_frontends=len(self._frontends),
            num_steps_total=counters.num_steps,
            tokens_in_use=scheduler.num_tokens_in_use,
            num_cache_queries_total=counters.num_cache_queries,
            num_cache_hits_total=counters.num_cache_hits,
            num_cached_blocks=self._pool.num_cached,
            num_evicted_blocks_total=self._pool.num_evicted,
            num_worker_restarts_total=self._executor.num_restarts,
            is_recovering=not self._executor.is_ready,
        )
