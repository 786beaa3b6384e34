"""The core process when its worker dies, with real processes: answers go on, one who is to blame fails alone."""

import os
import pathlib
import signal

import psutil

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.lifecycle import Failed
from folovllm.common.transport import encode
from tests.fakes.core_engine import is_empty, running_core
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent
from tests.fakes.fake_worker import Script, WorkerControl, expected_output, write_script

BOUND_S = 30.0
POISON = 666


def rows(count: int) -> list[SamplingRow]:
    """Greedy and seeded ones."""
    return [SamplingRow(seed=number * (number % 2)) for number in range(count)]


def test_workers_that_die_at_every_sixth_step_change_no_answer(tmp_path: pathlib.Path) -> None:
    script = Script(num_blocks=128, die_at=6)
    with running_core(tmp_path, script) as (parent, _), FakeFrontend(parent.endpoint) as frontend:
        prompts = {number: [number, 7, 8] * (1 + number) for number in range(6)}
        samplings = rows(6)
        frontend.add(
            *(
                make_request(number, prompt, 20, stream=number < 4, sampling=samplings[number])
                for number, prompt in prompts.items()
            )
        )
        for number, prompt in prompts.items():
            assert frontend.output(number) == expected_output(prompt, 20, samplings[number])
        stats = frontend.stats()
        assert is_empty(stats)
        assert stats.num_worker_restarts_total >= 2
        assert not stats.is_recovering


def worker_of(parent: FakeParent) -> psutil.Process:
    (worker,) = psutil.Process(parent.core.pid).children()
    return worker


def test_a_killed_worker_is_a_pause(tmp_path: pathlib.Path) -> None:
    with (
        running_core(tmp_path, Script(num_blocks=512)) as (parent, _),
        FakeFrontend(parent.endpoint) as frontend,
    ):
        samplings = rows(8)
        requests = [
            make_request(number, [number], 400, stream=True, sampling=sampling)
            for number, sampling in enumerate(samplings)
        ]
        frontend.add(*requests)
        while len(frontend.tokens[7]) < 20:
            frontend.receive()
        killed = worker_of(parent)
        os.kill(killed.pid, signal.SIGKILL)
        for number, sampling in enumerate(samplings):
            assert frontend.output(number) == expected_output([number], 400, sampling)
        stats = frontend.stats()
        while stats.is_recovering or not stats.num_worker_restarts_total:
            stats = frontend.stats()
        assert stats.num_worker_restarts_total == 1
        assert worker_of(parent).pid != killed.pid
        assert not frontend.failures


def test_an_idle_engine_gets_a_new_worker_too(tmp_path: pathlib.Path) -> None:
    with WorkerControl(tmp_path) as worker, running_core(tmp_path, Script(control=worker.endpoint)) as (parent, _):
        worker.send_raw(b"exit", b"7")
        with FakeFrontend(parent.endpoint) as frontend:
            frontend.add(make_request(1, [1], 5))
            stats = frontend.stats()
            while not stats.num_worker_restarts_total or stats.is_recovering:
                stats = frontend.stats()
            assert worker.next_step().slots


def test_a_request_that_ends_workers_fails_alone_and_says_so(tmp_path: pathlib.Path) -> None:
    script = Script(num_blocks=128, poison=POISON)
    with running_core(tmp_path, script) as (parent, _), FakeFrontend(parent.endpoint) as frontend:
        frontend.add(
            *(make_request(number, [number, 5], 30, stream=True) for number in range(4)),
            make_request(9, [1, POISON, 2], 30, stream=True),
        )
        frontend.wait_for(9)
        assert frontend.finished[9].finish_reason == "error"
        assert "was in flight at 3 ends of the worker, alone at the last one (worker-0" in frontend.finished[9].error
        assert "exit code 9" in frontend.finished[9].error
        for number in range(4):
            assert frontend.output(number) == expected_output([number, 5], 30, SamplingRow())
        stats = frontend.stats()
        assert stats.num_worker_restarts_total == 3
        assert is_empty(stats)


def test_too_many_deaths_end_the_engine_with_the_cause(tmp_path: pathlib.Path) -> None:
    with (
        running_core(tmp_path, Script(die_at=0), max_worker_restarts=1) as (parent, _),
        FakeFrontend(parent.endpoint) as frontend,
    ):
        frontend.add(make_request(1, [1], 5))
        while not frontend.failures:
            frontend.receive()
        cause = r"ended with exit code 9 (2 workers in a row have ended, and max_worker_restarts=1)"
        assert cause in frontend.failures[0]
        assert cause in parent.failure().message
        assert parent.core.wait(BOUND_S)
        assert parent.core.exit_code() == 1
        assert not parent.runtime_dir.exists()


def test_a_new_worker_that_cannot_start_ends_the_engine_with_its_words(tmp_path: pathlib.Path) -> None:
    with running_core(tmp_path, Script()) as (parent, _):
        write_script(tmp_path / "model", Script(fail="no such tensor"))
        os.kill(worker_of(parent).pid, signal.SIGKILL)
        failure = parent.failure()
        assert (failure.error_type, failure.message) == ("ModelError", "no such tensor (a new worker cannot start)")
        assert parent.core.wait(BOUND_S)


def test_while_there_is_no_worker_the_core_answers_and_requests_wait(tmp_path: pathlib.Path) -> None:
    with running_core(tmp_path, Script()) as (parent, _), FakeFrontend(parent.endpoint) as frontend:
        write_script(tmp_path / "model", Script(stop_before="ready"))
        os.kill(worker_of(parent).pid, signal.SIGKILL)
        stats = frontend.stats()
        while not (stats.is_recovering and stats.num_worker_restarts_total):
            stats = frontend.stats()
        frontend.add(make_request(1, [1], 5), make_request(2, [2], 5, timeout_s=0.05))
        frontend.wait_for(2)
        assert frontend.finished[2].finish_reason == "timeout"
        assert frontend.stats().num_waiting == 1
        write_script(tmp_path / "model", Script())
        os.kill(worker_of(parent).pid, signal.SIGKILL)  # it hangs in its start
        assert frontend.output(1) == expected_output([1], 5, SamplingRow())
        assert frontend.stats().num_worker_restarts_total == 2


def test_a_worker_that_reports_its_end_is_replaced(tmp_path: pathlib.Path) -> None:
    with WorkerControl(tmp_path) as worker, running_core(tmp_path, Script(control=worker.endpoint)) as (parent, _):
        first = worker_of(parent)
        worker.send_raw(b"out", encode(Failed("worker-0", "RuntimeError", "the device is lost", "Traceback: ...")))
        with FakeFrontend(parent.endpoint) as frontend:
            frontend.add(make_request(1, [1], 5))
            worker.next_step()
            stats = frontend.stats()
            while not stats.num_worker_restarts_total:
                stats = frontend.stats()
        assert not first.is_running()
