"""Every end of the core process: whatever ends it, in whichever phase, nothing is left within five seconds."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from folovllm.common.config import EngineConfig
from folovllm.common.messages.lifecycle import Hello
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent, Started, make_model_dir
from tests.fakes.fake_worker import Script, WorkerControl
from tests.sources import ROOT

BOUND_S = 30.0  # five seconds are the promise; a machine may be held up
PHASES = ("importing", "hello", "configured", "ready", "mid-step")


@contextmanager
def core_in_phase(folder: pathlib.Path, phase: str) -> Iterator[FakeParent]:
    """A core that has come as far as `phase` and stays there."""
    with WorkerControl(folder) as worker, FakeParent() as parent:
        script = Script(stop_before="ready" if phase == "configured" else "", control=worker.endpoint)
        config = EngineConfig(model=str(make_model_dir(folder / "model", script)), log_level="warning")
        if phase == "hello":
            assert isinstance(parent.receive(), Hello)
        elif phase == "configured":
            parent.configure(config)
            _wait_for_worker(parent)
        elif phase in ("ready", "mid-step"):
            parent.start(config)
        if phase == "mid-step":
            with FakeFrontend(parent.endpoint) as frontend:
                frontend.add(make_request(1, [1, 2, 3], 10))
                worker.next_step()
                yield parent
        else:
            yield parent


def _wait_for_worker(parent: FakeParent) -> None:
    """Until the worker process exists; the core starts it before it reads anything else."""
    core = psutil.Process(parent.core.pid)
    while not core.children():
        assert parent.core.exit_code() is None, parent.core.exit_cause()


def processes_of(parent_pid: int) -> list[psutil.Process]:
    process = psutil.Process(parent_pid)
    return [process, *process.children(recursive=True)]


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=BOUND_S)
    assert not left, [process.cmdline() for process in left]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_L35_signals_end_the_core_in_every_phase(
    tmp_path: pathlib.Path, phase: str, number: int, exit_code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with core_in_phase(tmp_path, phase) as parent:
        processes = processes_of(parent.core.pid)
        os.kill(parent.core.pid, number)
        if phase != "importing":
            os.kill(parent.core.pid, number)  # a second one cuts nothing short
        assert parent.core.wait(BOUND_S)  # first: psutil would take the exit code of a child of ours
        assert_all_end(processes)
        # Before its first line the interpreter has its own way: killed by the signal, or KeyboardInterrupt.
        allowed = {exit_code} if phase != "importing" else {exit_code, -number, 1}
        assert parent.core.exit_code() in allowed
        if phase not in ("importing", "hello"):
            assert not parent.runtime_dir.exists()
    if phase != "importing":
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_to_end_is_obeyed_in_every_phase(tmp_path: pathlib.Path, phase: str) -> None:
    with core_in_phase(tmp_path, phase) as parent:
        processes = processes_of(parent.core.pid)
        parent.core.ask_to_stop()
        assert parent.core.wait(BOUND_S)  # first: psutil would take the exit code of a child of ours
        assert_all_end(processes)
        assert parent.core.exit_code() == 0
        assert not parent.runtime_dir.exists()


@pytest.mark.parametrize("phase", PHASES)
def test_L35_a_killed_parent_takes_the_core_along(tmp_path: pathlib.Path, phase: str) -> None:
    with WorkerControl(tmp_path) as worker:
        script = Script(
            stop_before="ready" if phase == "configured" else "", control=worker.endpoint if phase == "mid-step" else ""
        )
        model_dir = make_model_dir(tmp_path / "model", script)
        command = [sys.executable, "-m", "tests.fakes.fake_parent", str(model_dir), phase.replace("mid-step", "ready")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
            assert parent.stdout is not None
            started = msgspec.json.decode(parent.stdout.readline(), type=Started)
            if phase == "mid-step":
                with FakeFrontend(started.endpoint) as frontend:
                    frontend.add(make_request(1, [1, 2, 3], 10))
                    worker.next_step()
            processes = processes_of(started.core_pid)
            parent.kill()
            assert_all_end(processes)
    assert not pathlib.Path(started.runtime_dir).exists()


@pytest.mark.parametrize("phase", ["ready", "mid-step"])
def test_a_killed_core_takes_its_worker_along(tmp_path: pathlib.Path, phase: str) -> None:
    with core_in_phase(tmp_path, phase) as parent:
        processes = processes_of(parent.core.pid)
        assert len(processes) == 2
        os.kill(parent.core.pid, signal.SIGKILL)
        assert parent.core.wait(BOUND_S)
        assert_all_end(processes)


@pytest.mark.parametrize("end", ["parent gone", "SIGTERM", "failed start"])
def test_the_file_of_a_chosen_endpoint_goes_with_the_core(tmp_path: pathlib.Path, end: str) -> None:
    script = Script(fail="no such tensor" if end == "failed start" else "")
    config = EngineConfig(model=str(make_model_dir(tmp_path / "model", script)), log_level="error")
    listen = tmp_path / "engine.sock"
    with FakeParent() as parent:
        if end == "failed start":
            parent.configure(config, f"ipc://{listen}")
            assert "no such tensor" in parent.failure().message
        else:
            assert parent.start(config, f"ipc://{listen}").endpoint == f"ipc://{listen}"
            assert listen.is_socket()
            if end == "SIGTERM":
                os.kill(parent.core.pid, signal.SIGTERM)
            else:
                parent.core.ask_to_stop()
        assert parent.core.wait(BOUND_S)
        assert not listen.exists()


def test_20_starts_and_stops_leave_nothing(tmp_path: pathlib.Path) -> None:
    model_dir = make_model_dir(tmp_path / "model", Script())
    descriptors = psutil.Process().num_fds()
    for _ in range(20):
        with FakeParent() as parent:
            parent.start(EngineConfig(model=str(model_dir), log_level="error"))
            processes = processes_of(parent.core.pid)
            assert parent.stop() == 0
            assert_all_end(processes)
            assert not parent.runtime_dir.exists()
    assert psutil.Process().num_fds() <= descriptors + 1
    assert not [thread for thread in psutil.Process().children() if thread.is_running()]


def test_started_alone_it_ends_by_a_signal(tmp_path: pathlib.Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody"
    command = [sys.executable, "-m", "folovllm.core_proc", "--connect", endpoint]
    with subprocess.Popen(command, cwd=ROOT) as core:
        process = psutil.Process(core.pid)
        while process.num_threads() < 3:  # ZeroMQ's threads are there: it has dialled
            assert core.poll() is None
        core.terminate()
        assert core.wait(BOUND_S) == 143
