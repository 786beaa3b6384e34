"""Records what the scheduler is told and what it decides, for `folovllm trace`.

The recorder is told of each door after it was gone through. It adds what a door's arguments and results do not say:
who got which slot, who lost it, how many blocks are free. An engine that records nothing has a recorder that does
nothing, so that nobody asks whether there is one.
"""

from collections.abc import Sequence
from typing import Protocol

from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.trace_file import (
    Admitted,
    Arrived,
    CacheReset,
    Ended,
    Resulted,
    Scheduled,
    Stopped,
    TraceRecord,
    TraceWriter,
    WorkerLost,
)
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import Scheduler

NO_STEP = -1
_FLUSH_INTERVAL_S = 1.0
_TOKEN_ID_BYTES = 4

logger = get_logger(__name__)


class Sink(Protocol):
    """Where records go."""

    def write(self, record: TraceRecord) -> None: ...

    def flush(self) -> None: ...


class FileSink:
    """A file. A disk that takes no more ends the recording, never the engine."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer: TraceWriter | None = writer

    def write(self, record: TraceRecord) -> None:
        if self._writer is not None:
            try:
                self._writer.write(record)
            except OSError as error:
                self._give_up(self._writer, error)

    def flush(self) -> None:
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._give_up(self._writer, error)

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _give_up(self, writer: TraceWriter, error: OSError) -> None:
        logger.warning("trace file %s cannot be written (%s); nothing more is recorded", writer.path, error.strerror)
        self._writer = None


class Recorder(Protocol):
    """Is told of every door of the scheduler, in order, right after it."""

    def added(self, request: Request, now_s: float) -> None:
        """`add_request`."""
        ...

    def scheduled(self, step: SchedulerOutput | None, now_s: float) -> None:
        """`schedule`, and what it gave."""
        ...

    def updated(self, output: ModelRunnerOutput, finished: Sequence[Request], now_s: float) -> None:
        """`update_from_output`, and who ended by it."""
        ...

    def stopped(self, ended: Sequence[Request], now_s: float) -> None:
        """`finish_requests`, and whom it ended."""
        ...

    def cache_reset(self, now_s: float) -> None:
        """`reset_prefix_cache`."""
        ...

    def worker_lost(self, suspects: Sequence[Request], now_s: float) -> None:
        """`lose_worker`, and `run_alone` with these."""
        ...

    def flush(self, now_s: float) -> None:
        """Called in every turn: what was recorded becomes readable for others within a second or so."""
        ...


class NoRecorder:
    """Records nothing."""

    def added(self, _request: Request, _now_s: float) -> None:
        return

    def scheduled(self, _step: SchedulerOutput | None, _now_s: float) -> None:
        return

    def updated(self, _output: ModelRunnerOutput, _finished: Sequence[Request], _now_s: float) -> None:
        return

    def stopped(self, _ended: Sequence[Request], _now_s: float) -> None:
        return

    def cache_reset(self, _now_s: float) -> None:
        return

    def worker_lost(self, _suspects: Sequence[Request], _now_s: float) -> None:
        return

    def flush(self, _now_s: float) -> None:
        return


class TraceRecorder:
    """Hands a record of each door to `sink`. It looks at the scheduler and its pool and changes neither."""

    def __init__(self, scheduler: Scheduler, pool: BlockPool, sink: Sink) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._sink = sink
        self._flush_at_s = 0.0
        self._running: set[Request] = set()
        self._num_preemptions = scheduler.counters.num_preemptions
        self._slots = b""

    def added(self, request: Request, now_s: float) -> None:
        parent = request.parent
        self._sink.write(
            Arrived(
                time_s=now_s,
                request=request.arrival_order,
                request_id=request.request_id,
                client=request.client,
                number=request.number,
                prompt_token_ids=request.prompt_token_ids.tobytes() if parent is None else b"",
                sampling=request.sampling,
                max_tokens=request.max_tokens,
                priority=request.priority,
                stream=request.stream,
                cache_salt=request.cache_salt,
                skip_reading_prefix_cache=request.skip_reading_prefix_cache,
                parent=None if parent is None else parent.arrival_order,
                sample_index=request.sample_index,
                has_grammar=request.grammar is not None,
            )
        )

    def scheduled(self, step: SchedulerOutput | None, now_s: float) -> None:
        preempted = self._take_preempted()
        if step is None:
            if preempted:
                self._sink.write(Scheduled(now_s, NO_STEP, b"", b"", self._pool.num_free, preempted=preempted))
            return
        is_same, self._slots = step.slots == self._slots, step.slots
        self._sink.write(
            Scheduled(
                time_s=now_s,
                step_id=step.step_id,
                slots=None if is_same else step.slots,
                num_scheduled_tokens=step.num_scheduled_tokens,
                num_free_blocks=self._pool.num_free,
                append_slots=step.append_slots,
                append_block_ids=step.append_block_ids,
                block_copies=step.block_copies,
                admitted=self._admitted(step),
                preempted=preempted,
            )
        )

    def updated(self, output: ModelRunnerOutput, finished: Sequence[Request], now_s: float) -> None:
        self._sink.write(
            Resulted(
                time_s=now_s,
                step_id=output.step_id,
                token_ids=output.token_ids,
                num_free_blocks=self._pool.num_free,
                no_token_rows=output.no_token_rows,
                error=output.error,
                ended=self._ended(finished),
                max_num_tokens=output.max_num_tokens,
            )
        )

    def stopped(self, ended: Sequence[Request], now_s: float) -> None:
        if ended:
            self._sink.write(Stopped(now_s, self._ended(ended), self._pool.num_free, ended[0].error))

    def cache_reset(self, now_s: float) -> None:
        self._sink.write(CacheReset(now_s))

    def worker_lost(self, suspects: Sequence[Request], now_s: float) -> None:
        numbers = [request.arrival_order for request in suspects]
        self._sink.write(WorkerLost(now_s, self._take_preempted(), numbers))

    def flush(self, now_s: float) -> None:
        if now_s >= self._flush_at_s:
            self._flush_at_s = now_s + _FLUSH_INTERVAL_S
            self._sink.flush()

    def _admitted(self, step: SchedulerOutput) -> list[Admitted]:
        admitted = []
        for new in step.new_requests:
            request = self._scheduler.request_in(new.slot)
            self._running.add(request)
            num_tokens = len(new.token_ids) // _TOKEN_ID_BYTES
            admitted.append(
                Admitted(new.slot, request.arrival_order, num_tokens, new.num_computed_tokens, new.block_ids)
            )
        return admitted

    def _take_preempted(self) -> list[int]:
        """Who has lost its slot in the pass that is just over."""
        num_preemptions = self._scheduler.counters.num_preemptions
        if num_preemptions == self._num_preemptions:
            return []
        self._num_preemptions = num_preemptions
        preempted = [request for request in self._running if request.status is RequestStatus.PREEMPTED]
        self._running.difference_update(preempted)
        return sorted(request.arrival_order for request in preempted)

    def _ended(self, requests: Sequence[Request]) -> list[Ended]:
        self._running.difference_update(requests)
        return [
            Ended(request.arrival_order, request.finish_reason, request.output_token_ids.size) for request in requests
        ]
