"""The engine from inside, for whoever looks on: requests, last steps, blocks. Made on request, at a bounded cost.

A snapshot of 4,096 blocks and 256 requests takes about a millisecond; a step is noted in a microsecond.
"""

import collections
from typing import Final, Literal

import numpy as np

from folovllm.common.messages.core_worker import SchedulerOutput
from folovllm.common.messages.frontend_core import EngineSnapshot, EngineStats, RequestSnapshot, StepSnapshot
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import Scheduler

MAX_STEPS: Final = 240
MAX_REQUESTS: Final = 256
MAX_BLOCKS: Final = 4096
_TOKEN_BYTES: Final = 4

FREE, FREE_CACHED, IN_USE, SHARED = range(4)
_WORDS: Final[dict[RequestStatus, Literal["waiting", "running", "preempted"]]] = {
    RequestStatus.WAITING: "waiting",
    RequestStatus.RUNNING: "running",
    RequestStatus.PREEMPTED: "preempted",
}


class StepHistory:
    """The last steps."""

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[int, int, int, float]] = collections.deque(maxlen=MAX_STEPS)

    def note(self, step: SchedulerOutput, now_s: float) -> None:
        """A step was submitted."""
        num_decodes = (len(step.slots) - len(step.num_scheduled_tokens)) // _TOKEN_BYTES
        num_others = int(np.frombuffer(step.num_scheduled_tokens, "<i4").sum()) if step.num_scheduled_tokens else 0
        self._steps.append((step.step_id, num_decodes, num_others, now_s))

    def snapshots(self, now_s: float) -> list[StepSnapshot]:
        """Oldest first."""
        return [StepSnapshot(step_id, decodes, others, now_s - at_s) for step_id, decodes, others, at_s in self._steps]


def take_snapshot(
    stats: EngineStats, scheduler: Scheduler, pool: BlockPool, steps: StepHistory, now_s: float
) -> EngineSnapshot:
    """The engine now; `stats` has the ticket."""
    stride = -(-pool.num_usable // MAX_BLOCKS)
    return EngineSnapshot(
        ticket=stats.ticket,
        stats=stats,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        requests=[_of_request(request, scheduler, now_s) for request in scheduler.first_requests(MAX_REQUESTS)],
        steps=steps.snapshots(now_s),
        blocks=bytes(_state_of(pool, block) for block in range(1, pool.num_usable + 1, stride)),
        block_stride=stride,
    )


def _of_request(request: Request, scheduler: Scheduler, now_s: float) -> RequestSnapshot:
    num_known, num_computed = scheduler.progress(request)
    return RequestSnapshot(
        client=request.client,
        number=request.number,
        status=_WORDS[request.status],
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        num_known_tokens=num_known,
        num_computed_tokens=num_computed,
        num_cached_tokens=request.num_cached_tokens,
        max_tokens=request.max_tokens,
        num_preemptions=request.num_preemptions,
        age_s=now_s - request.arrival_s,
    )


def _state_of(pool: BlockPool, block: int) -> int:
    if pool.is_free(block):
        return FREE_CACHED if pool.is_cached(block) else FREE
    return SHARED if pool.is_shared(block) else IN_USE
