"""The executor against a fake worker process: bounds that a test must not wait for, held by a clock of its own."""

import os
import pathlib
from collections.abc import Iterator

import pytest
import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker, Failed, WorkerReady
from folovllm.common.stop_signals import StopRequested, StopSignals
from folovllm.common.transport import encode
from folovllm.core_proc.executor import STEP_BOUND_S, Executor, WorkerLost
from folovllm.core_proc.waiter import Waiter
from folovllm.core_proc.worker_link import WorkerLink
from tests.fakes.fake_parent import make_model_dir
from tests.fakes.fake_worker import Script, WorkerControl, write_script

BOUND_MS = 10_000


class NoSignals(StopSignals):
    """Leaves the signals of the test's own process alone; `fd` is set by the test."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def exit_code(self) -> int:
        return 143


class FakeWatch(ParentWatch):
    """The watch's descriptor without its thread, which would end the test's process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


@pytest.fixture
def worker(tmp_path: pathlib.Path) -> Iterator[WorkerControl]:
    with WorkerControl(tmp_path) as worker:
        yield worker


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    quiet, quiet_write = os.pipe()
    yield Waiter(None, NoSignals(quiet))
    os.close(quiet)
    os.close(quiet_write)


@pytest.fixture
def executor(tmp_path: pathlib.Path, worker: WorkerControl, waiter: Waiter) -> Iterator[Executor]:
    """An executor whose worker is the test, ready for steps."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    model_dir = make_model_dir(tmp_path / "model", Script(num_blocks=9, control=worker.endpoint))
    executor = Executor(WorkerLink(context, tmp_path, "tests.fakes.fake_worker"))
    try:
        configure = ConfigureWorker(EngineConfig(model=str(model_dir)), 0, 64)
        assert executor.start(waiter, configure).num_blocks == 9
        yield executor
    finally:
        executor.close(5.0)
        context.destroy(0)


def collect(executor: Executor) -> list[ModelRunnerOutput]:
    assert executor.socket.poll(BOUND_MS)
    return list(executor.collect())


class Turns:
    """What the engine's loop does with an executor, on a clock that a test moves."""

    def __init__(self, executor: Executor, waiter: Waiter) -> None:
        self.executor, self.waiter, self.now_s = executor, waiter, 0.0

    def until(self, kind: type[WorkerLost | WorkerReady]) -> WorkerLost | WorkerReady:
        """Turns until that happens; each turn counts for a tenth of a second."""
        for _ in range(10_000):
            sources = self.waiter.wait(10)
            self.now_s += 0.1
            event = self.executor.check(sources, self.now_s)
            if self.executor.socket in sources:
                assert not list(self.executor.collect())
            if event is not None:
                assert isinstance(event, kind), event
                return event
        raise AssertionError(f"no {kind.__name__}")

    def lost(self) -> WorkerLost:
        event = self.until(WorkerLost)
        assert isinstance(event, WorkerLost)
        assert not self.executor.is_ready
        return event

    def replace(self) -> None:
        self.executor.restart(self.now_s)
        self.until(WorkerReady)
        assert self.executor.is_ready
        assert self.executor.num_in_flight == 0


def test_steps_are_answered_in_order(executor: Executor, worker: WorkerControl) -> None:
    steps = [SchedulerOutput(step_id, b"") for step_id in range(2)]
    for step in steps:
        executor.submit(step, 0.0)
    assert executor.num_in_flight == 2
    assert [worker.next_step() for _ in steps] == steps
    worker.answer(ModelRunnerOutput(1))  # out of order: refused
    worker.answer(ModelRunnerOutput(0))
    outputs = collect(executor)
    while not outputs:
        outputs = collect(executor)
    assert outputs == [ModelRunnerOutput(0)]
    assert executor.num_in_flight == 1


def test_a_refused_result_is_still_owed(executor: Executor, worker: WorkerControl) -> None:
    executor.submit(SchedulerOutput(0, b""), 0.0)
    worker.next_step()
    for error in ("wrong", "right"):
        worker.answer(ModelRunnerOutput(0, error=error))
        assert executor.socket.poll(BOUND_MS)
        for output in executor.collect():
            assert output.error == error
            if error == "wrong":
                executor.refuse("it is wrong")
        assert executor.num_in_flight == (1 if error == "wrong" else 0)


def test_L36_a_worker_that_never_answers_a_step_is_killed_and_replaced(
    executor: Executor, worker: WorkerControl, waiter: Waiter
) -> None:
    assert executor.check([], 10 * STEP_BOUND_S) is None  # nothing is owed
    ticks = [executor.tick_ms]
    executor.submit(SchedulerOutput(0, b""), 100.0)
    ticks.append(executor.tick_ms)
    assert ticks == [None, 1000]
    assert executor.check([], 100.0 + STEP_BOUND_S) is None
    turns = Turns(executor, waiter)
    turns.now_s = 101.0 + STEP_BOUND_S
    assert turns.lost() == ("worker-0 has not answered step 0 for 300 s", None, True)
    worker.next_step()
    turns.replace()
    executor.submit(SchedulerOutput(1, b""), turns.now_s)
    assert worker.next_step().step_id == 1
    worker.answer(ModelRunnerOutput(1))
    assert collect(executor) == [ModelRunnerOutput(1)]


def test_a_steps_time_begins_when_the_one_before_is_done(executor: Executor, worker: WorkerControl) -> None:
    for step_id in range(2):
        executor.submit(SchedulerOutput(step_id, b""), 0.0)
    worker.answer(ModelRunnerOutput(0))
    assert collect(executor) == [ModelRunnerOutput(0)]
    for now_s in (0.9 * STEP_BOUND_S, 1.8 * STEP_BOUND_S):
        assert executor.check([], now_s) is None
        assert executor.is_ready
    executor.check([], 2.0 * STEP_BOUND_S)
    assert not executor.is_ready


def test_a_worker_that_is_gone_is_replaced_and_what_it_owed_is_forgotten(
    executor: Executor, worker: WorkerControl, waiter: Waiter
) -> None:
    turns = Turns(executor, waiter)
    for number in range(3):
        executor.submit(SchedulerOutput(number, b""), turns.now_s)
        worker.next_step()
        worker.send_raw(b"exit", b"3")
        cause, report, was_ready = turns.lost()
        assert (cause.endswith("ended with exit code 3"), report, was_ready) == (True, None, True)
        assert executor.num_restarts == number
        turns.replace()
    assert executor.num_restarts == 3


def test_submitting_to_a_worker_that_is_gone_is_no_error_and_its_end_shows(
    executor: Executor, worker: WorkerControl, waiter: Waiter
) -> None:
    worker.send_raw(b"exit", b"3")
    for step_id in range(10_000):
        if not executor.is_ready:
            break
        executor.submit(SchedulerOutput(step_id, b""), 0.0)
        executor.socket.poll(1)
    assert not executor.is_ready
    assert Turns(executor, waiter).lost().cause.endswith("ended with exit code 3")


def test_a_worker_that_says_that_it_cannot_go_on_is_ended_and_its_words_are_the_cause(
    executor: Executor, worker: WorkerControl, waiter: Waiter
) -> None:
    report = Failed("worker-0", "RuntimeError", "the device is lost", "Traceback: ...")
    worker.send_raw(b"out", encode(report))  # and stays
    turns = Turns(executor, waiter)
    assert turns.lost() == ("worker-0: RuntimeError: the device is lost", report, True)
    turns.replace()


def test_a_new_worker_that_cannot_start_is_told_from_one_that_was_ready(
    executor: Executor, worker: WorkerControl, waiter: Waiter, tmp_path: pathlib.Path
) -> None:
    turns = Turns(executor, waiter)
    worker.send_raw(b"exit", b"3")
    turns.lost()
    write_script(tmp_path / "model", Script(fail="no such tensor"))
    executor.restart(turns.now_s)
    cause, report, was_ready = turns.lost()
    assert (cause, was_ready) == ("worker-0: ModelError: no such tensor", False)
    assert report is not None


def test_a_start_that_takes_too_long_is_ended(
    executor: Executor, worker: WorkerControl, waiter: Waiter, tmp_path: pathlib.Path
) -> None:
    turns = Turns(executor, waiter)
    worker.send_raw(b"exit", b"3")
    turns.lost()
    write_script(tmp_path / "model", Script(stop_before="ready"))
    executor.restart(turns.now_s)
    turns.now_s += STEP_BOUND_S
    assert turns.lost() == ("worker-0 was not ready after 300 s", None, False)


def test_the_waiter_lets_a_signal_and_the_parents_end_stop_every_wait() -> None:
    for exit_code in (143, 0):
        read, write = os.pipe()
        quiet_read, quiet_write = os.pipe()
        try:
            watch = FakeWatch(read if exit_code == 0 else quiet_read)
            waiter = Waiter(watch, NoSignals(quiet_read if exit_code == 0 else read))
            assert waiter.wait(0) == []
            os.write(write, b"x")
            with pytest.raises(StopRequested) as caught:
                waiter.wait(None)
            assert caught.value.exit_code == exit_code
        finally:
            for fd in (read, write, quiet_read, quiet_write):
                os.close(fd)
