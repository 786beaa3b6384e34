"""What is done, in which order, when a worker has ended; the executor is one that only tells what a test has happen."""

import logging

import pytest

from folovllm.common.errors import EngineDeadError
from folovllm.common.log import ROOT_NAME
from folovllm.common.messages.lifecycle import Failed, WorkerReady
from folovllm.common.trace_file import Stopped
from folovllm.common.trace_file import WorkerLost as WorkerLostRecord
from folovllm.core_proc.executor import WorkerFailedError, WorkerLost
from folovllm.core_proc.recovery import Recovery
from folovllm.core_proc.request import RequestStatus
from folovllm.core_proc.supervisor import Supervisor
from folovllm.core_proc.tracing import TraceRecorder
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import SimulatedWorker
from tests.fakes.traced_engine import ListSink

KILLED = WorkerLost("worker-0 was killed by SIGKILL", None, was_ready=True)
READY = WorkerReady(65, "fake", "float32", "fake", [], [])


class FakeExecutor:
    """Tells what the test has happen, once."""

    def __init__(self) -> None:
        self.happens: WorkerLost | WorkerReady | None = None
        self.restarted_at: list[float] = []

    def check(self, _sources: list[object], _now_s: float) -> WorkerLost | WorkerReady | None:
        happens, self.happens = self.happens, None
        return happens

    def restart(self, now_s: float) -> None:
        self.restarted_at.append(now_s)


class Setup:
    """An engine whose worker ends when the test says so."""

    def __init__(self, max_restarts: int = 5) -> None:
        self.engine, self.executor, self.sink = SimulatedEngine(depth=1), FakeExecutor(), ListSink()
        self.recovery = Recovery(
            executor=self.executor,  # type: ignore[arg-type]
            scheduler=self.engine.scheduler,
            supervisor=Supervisor(max_restarts, 0.0),
            recorder=TraceRecorder(self.engine.scheduler, self.engine.pool, self.sink),
        )

    def happen(self, event: WorkerLost | WorkerReady, now_s: float = 1.0) -> list[object]:
        self.executor.happens = event
        failed = self.recovery.look([], now_s)
        if isinstance(event, WorkerLost):
            engine = self.engine
            engine.in_flight.clear()
            engine.worker = SimulatedWorker(engine.worker.block_size, engine.worker.num_blocks)
            engine.worker.next_step_id = engine.scheduler.counters.num_steps
            engine.finished += failed
        return list(failed)


def test_nothing_happens_as_a_rule() -> None:
    setup = Setup()
    assert setup.recovery.look([], 1.0) == []
    assert not setup.sink.records


def test_a_lost_worker_is_replaced_and_the_requests_wait_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    (request,) = setup.engine.add(5, stream=True)
    for _ in range(3):
        setup.engine.turn()
    with caplog.at_level(logging.WARNING, ROOT_NAME):
        assert setup.happen(KILLED, 7.0) == []
        assert setup.happen(READY, 9.5) == []
    assert setup.executor.restarted_at == [7.0]
    assert request.status is RequestStatus.PREEMPTED
    assert "killed by SIGKILL; another worker is started, 0 requests in flight are computed anew" in caplog.text
    assert "ready after 2.5 s" in caplog.text
    setup.engine.run()
    assert [type(record) for record in setup.sink.records] == [WorkerLostRecord]


def test_who_ends_workers_runs_alone_then_fails_and_the_others_get_their_answers() -> None:
    setup = Setup()
    culprit, other = setup.engine.add(5)[0], setup.engine.add(6)[0]
    for _ in range(2):
        setup.engine.schedule()
        assert setup.happen(KILLED) == []
        setup.happen(READY)
    step = setup.engine.schedule()
    assert step is not None
    assert len(step.new_requests) == 1
    assert setup.happen(KILLED) == [culprit]
    assert culprit.error == (
        "it was in flight at 3 ends of the worker, alone at the last one (worker-0 was killed by SIGKILL)"
    )
    setup.happen(READY)
    setup.engine.run()
    assert other.finish_reason == "length"
    assert any(isinstance(record, Stopped) and record.error == culprit.error for record in setup.sink.records)


def test_an_engine_that_gives_up_ends_with_the_cause_and_starts_nothing() -> None:
    setup = Setup(max_restarts=0)
    with pytest.raises(EngineDeadError, match=r"killed by SIGKILL \(max_worker_restarts=0: it is not replaced\)"):
        setup.happen(KILLED)
    assert not setup.executor.restarted_at


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_workers_own_words_are_passed_on(was_ready: bool) -> None:
    setup = Setup()
    report = Failed("worker-0", "ModelError", "no such tensor", "Traceback: ...")
    setup.happen(KILLED)
    if was_ready:  # then it is no failed start
        setup.happen(READY)
        assert setup.happen(WorkerLost("worker-0: ModelError: no such tensor", report, was_ready=True)) == []
        return
    with pytest.raises(WorkerFailedError) as caught:
        setup.happen(WorkerLost("worker-0: ModelError: no such tensor", report, was_ready=False))
    assert caught.value.report.message == "no such tensor (a new worker cannot start)"
    assert caught.value.report.traceback == report.traceback


@pytest.mark.parametrize(
    "report",
    [None, Failed("worker-0", "ConfigError", "the KV cache would take 9 MiB, but only 8 MiB can be taken", "")],
)
def test_a_start_that_fails_for_another_cause_is_tried_again(report: Failed | None) -> None:
    setup = Setup()
    setup.happen(KILLED, 1.0)
    setup.happen(WorkerLost("worker-0 ended with exit code 1", report, was_ready=False), 2.0)
    assert setup.executor.restarted_at == [1.0, 2.0]
