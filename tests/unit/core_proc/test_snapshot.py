"""The engine from inside: what a snapshot shows of requests, steps and blocks, and that it stays small."""

from folovllm.common.messages.core_worker import SchedulerOutput
from folovllm.common.messages.frontend_core import EngineSnapshot, EngineStats
from folovllm.common.transport import encode
from folovllm.core_proc.snapshot import (
    FREE,
    FREE_CACHED,
    IN_USE,
    MAX_BLOCKS,
    MAX_REQUESTS,
    MAX_STEPS,
    SHARED,
    StepHistory,
    take_snapshot,
)
from tests.fakes.simulated_engine import SimulatedEngine

STATS = EngineStats(7, *range(16))


class Watched:
    """A simulated engine whose steps are noted."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.steps = StepHistory()

    def schedule(self) -> None:
        step = self.engine.schedule()
        assert step is not None
        self.steps.note(step, self.engine.now_s)

    def snapshot(self) -> EngineSnapshot:
        return take_snapshot(STATS, self.engine.scheduler, self.engine.pool, self.steps, self.engine.now_s)


def test_an_idle_engine() -> None:
    snapshot = Watched(SimulatedEngine(num_blocks=10)).snapshot()
    assert snapshot == EngineSnapshot(7, STATS, 64, [], [], bytes([FREE] * 10), 1)


def test_requests_that_run_then_those_that_wait() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=16)
    watched = Watched(engine)
    engine.add(10, priority=3, max_tokens=5)
    engine.add(20)
    engine.add(30)
    watched.schedule()
    requests = watched.snapshot().requests
    assert [(request.number, request.status) for request in requests] == [
        (0, "running"),
        (1, "running"),
        (2, "waiting"),
    ]
    assert [request.num_prompt_tokens for request in requests] == [10, 20, 30]
    assert [request.num_computed_tokens for request in requests] == [10, 6, 0]
    assert [request.num_known_tokens for request in requests] == [11, 20, 30]  # one token is on its way
    assert (requests[0].priority, requests[0].max_tokens) == (3, 5)
    engine.update()
    assert [request.age_s for request in watched.snapshot().requests] == [engine.now_s] * 3


def test_steps_are_split_into_prefill_and_decode() -> None:
    engine = SimulatedEngine(max_num_batched_tokens=16)
    watched = Watched(engine)
    engine.add(10)
    watched.schedule()
    engine.update()
    engine.add(20)
    watched.schedule()
    engine.update()
    steps = watched.snapshot().steps
    assert [(step.step_id, step.num_decode_tokens, step.num_prefill_tokens) for step in steps] == [
        (0, 0, 10),
        (1, 1, 15),
    ]
    assert steps[0].age_s > steps[1].age_s > 0


def test_blocks_free_cached_used_and_shared() -> None:
    engine = SimulatedEngine(num_blocks=12)
    watched = Watched(engine)
    engine.add(9, max_tokens=1)
    engine.run()
    states = watched.snapshot().blocks
    assert (states.count(FREE_CACHED), states.count(FREE)) == (2, 10)
    engine.add(list(engine.requests[0].prompt_token_ids), n=2)
    watched.schedule()
    engine.update()
    watched.schedule()
    states = watched.snapshot().blocks
    assert (states.count(SHARED), states.count(IN_USE)) == (2, 2)
    assert states.count(FREE) + states.count(FREE_CACHED) == engine.pool.num_free


def test_a_preempted_request_says_so() -> None:
    engine = SimulatedEngine(num_blocks=5, max_model_len=20, depth=1)
    watched = Watched(engine)
    engine.add(4, max_tokens=16)
    engine.add(4, max_tokens=16)
    while not engine.scheduler.counters.num_preemptions:
        engine.turn()
    preempted = [request for request in watched.snapshot().requests if request.status == "preempted"]
    assert [(request.number, request.num_preemptions, request.num_computed_tokens) for request in preempted] == [
        (1, 1, 0)
    ]
    assert preempted[0].num_known_tokens > 4


def test_a_snapshot_is_bounded_whatever_the_engine_has() -> None:
    engine = SimulatedEngine(num_blocks=3 * MAX_BLOCKS - 1, max_num_seqs=2)
    watched = Watched(engine)
    for _ in range(MAX_REQUESTS + 20):
        engine.add(1)
    for step_id in range(MAX_STEPS + 5):
        watched.steps.note(SchedulerOutput(step_id, b"\0" * 8, b""), 0.0)
    snapshot = watched.snapshot()
    assert len(snapshot.requests) == MAX_REQUESTS
    assert len(snapshot.steps) == MAX_STEPS
    assert (snapshot.steps[-1].step_id, snapshot.steps[-1].num_decode_tokens) == (MAX_STEPS + 4, 2)
    assert (len(snapshot.blocks), snapshot.block_stride) == (MAX_BLOCKS, 3)
    assert len(encode(snapshot)) < 40_000
