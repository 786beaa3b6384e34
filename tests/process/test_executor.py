"""The executor against a fake worker process: bounds that a test must not wait for, held by a clock of its own."""

import os
import pathlib
from collections.abc import Iterator

import pytest
import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.config import EngineConfig
from folovllm.common.errors import EngineDeadError
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker
from folovllm.common.stop_signals import StopRequested, StopSignals
from folovllm.core_proc.executor import STEP_BOUND_S, Executor
from folovllm.core_proc.waiter import Waiter
from tests.fakes.fake_parent import make_model_dir
from tests.fakes.fake_worker import Script, WorkerControl

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
def executor(tmp_path: pathlib.Path, worker: WorkerControl) -> Iterator[Executor]:
    """An executor whose worker is the test, ready for steps."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    model_dir = make_model_dir(tmp_path / "model", Script(num_blocks=9, control=worker.endpoint))
    quiet, quiet_write = os.pipe()
    executor = Executor(context, str(tmp_path), "tests.fakes.fake_worker")
    try:
        waiter = Waiter(None, NoSignals(quiet))
        configure = ConfigureWorker(EngineConfig(model=str(model_dir)), 0, 64)
        assert executor.start(waiter, configure).num_blocks == 9
        yield executor
    finally:
        executor.close(5.0)
        context.destroy(0)
        os.close(quiet)
        os.close(quiet_write)


def collect(executor: Executor) -> list[ModelRunnerOutput]:
    assert executor.socket.poll(BOUND_MS)
    return list(executor.collect())


def submit_until_refused(executor: Executor) -> None:
    """Submits until the connection's end is noticed, at most for some ten seconds."""
    for step_id in range(10_000):
        executor.submit(SchedulerOutput(step_id, b""), 0.0)
        executor.socket.poll(1)


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


def test_L36_a_step_that_is_never_answered_ends_the_engine(executor: Executor) -> None:
    executor.check([], 10 * STEP_BOUND_S)  # nothing is owed
    executor.submit(SchedulerOutput(0, b""), 100.0)
    executor.check([], 100.0 + STEP_BOUND_S)
    with pytest.raises(EngineDeadError, match="worker-0 has not answered step 0 for 600 s"):
        executor.check([], 101.0 + STEP_BOUND_S)


def test_submitting_to_a_worker_that_is_gone_tells_its_end(executor: Executor, worker: WorkerControl) -> None:
    worker.send_raw(b"exit", b"3")
    with pytest.raises(EngineDeadError, match="ended with exit code 3"):
        submit_until_refused(executor)


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
