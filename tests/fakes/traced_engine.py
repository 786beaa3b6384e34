"""A simulated engine whose scheduler is recorded as the core records it."""

from collections.abc import Callable, Sequence
from typing import Any

from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.trace_file import TRACE_VERSION, TraceHeader, TraceRecord
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import StepOutcome
from folovllm.core_proc.tracing import TraceRecorder
from tests.fakes.simulated_engine import SimulatedEngine

HEADER = TraceHeader(
    version=TRACE_VERSION,
    folovllm_version="0",
    model="simulated",
    started_at=0.0,
    block_size=4,
    num_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=256,
    scheduling_policy="fcfs",
    enable_prefix_caching=True,
    long_prefill_token_threshold=None,
    max_num_partial_prefills=None,
    target_itl_s=None,
    pipeline_depth=2,
)


class ListSink:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.records: list[TraceRecord] = []
        self.num_flushes = 0

    def write(self, record: TraceRecord) -> None:
        self.records.append(record)

    def flush(self) -> None:
        self.num_flushes += 1


class TracedEngine(SimulatedEngine):
    """`records` is what a trace file would hold after `HEADER` (with this engine's options put in)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._sink = ListSink()
        self.records = self._sink.records
        self.recorder = TraceRecorder(self.scheduler, self.pool, self._sink)

    def add(self, prompt: Sequence[int] | int, **options: Any) -> list[Request]:
        requests = super().add(prompt, **options)
        for request in requests:
            self.recorder.added(request, self.now_s)
        return requests

    def schedule(self, *, fails: bool = False) -> SchedulerOutput | None:
        step = super().schedule(fails=fails)
        self.recorder.scheduled(step, self.now_s)
        return step

    def receive(self, output: ModelRunnerOutput) -> StepOutcome:
        outcome = super().receive(output)
        self.recorder.updated(output, outcome.finished, self.now_s)
        return outcome

    def finish(
        self, requests: Sequence[Request], status: RequestStatus = RequestStatus.FINISHED_ABORTED, error: str = ""
    ) -> list[Request]:
        ended = super().finish(requests, status, error)
        self.recorder.stopped(ended, self.now_s)
        return ended

    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.recorder.cache_reset(self.now_s)

    def lose_worker(self, run_alone: Callable[[list[Request]], list[Request]] = lambda _: []) -> list[Request]:
        suspects: list[Request] = []

        def note(lost: list[Request]) -> list[Request]:
            suspects.extend(run_alone(lost))
            return suspects

        lost = super().lose_worker(note)
        self.recorder.worker_lost(suspects, self.now_s)
        return lost
