"""The worker's end in each of its phases: by its parent's end, a signal, by force; soon, with the right exit code."""

import os
import pathlib
import select
import signal
import subprocess
import sys

import pytest

from folovllm.common.messages.core_worker import SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker
from tests.fakes.fake_core import MAX_MODEL_LEN, FakeCore, engine_config, int32, new_request, running_core, write_config
from tests.sources import ROOT

END_BOUND_S = 30.0  # soon; a machine may be held up
PHASES = ("hello", "loading", "ready", "busy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_config(tmp_path_factory.mktemp("model"))


def bring_to(phase: str, core: FakeCore, folder: pathlib.Path) -> None:
    """ "hello": waits for its configuration; "loading": imports torch and loads; "ready": idle; "busy": has steps."""
    config = engine_config(folder)
    if phase in ("ready", "busy"):
        core.start(config)
    else:
        core.expect_hello()
    if phase == "loading":
        core.send(ConfigureWorker(config, 0, MAX_MODEL_LEN))
    if phase == "busy":
        core.send(SchedulerOutput(0, int32([0]), int32([2]), [new_request(0, [1, 2], list(range(1, 17)))]))
        for step_id in range(1, 60):
            core.send(SchedulerOutput(step_id, int32([0])))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_worker_with_its_exit_code(
    phase: str, number: signal.Signals, exit_code: int, folder: pathlib.Path
) -> None:
    with running_core() as core:
        bring_to(phase, core, folder)
        os.kill(core.worker.pid, number)
        assert core.worker.wait(END_BOUND_S)
        assert core.worker.exit_code() == exit_code


@pytest.mark.parametrize("phase", PHASES)
def test_the_closed_pipe_ends_the_worker_with_0(phase: str, folder: pathlib.Path) -> None:
    with running_core() as core:
        bring_to(phase, core, folder)
        core.worker.ask_to_stop()
        assert core.worker.wait(END_BOUND_S)
        assert core.worker.exit_code() == 0


@pytest.mark.parametrize("phase", ["hello", "loading", "ready"])
def test_the_worker_does_not_outlive_a_core_that_is_killed(phase: str, folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tests.fakes.fake_core", str(folder), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as core:
        assert core.stdout is not None
        worker = os.pidfd_open(int(core.stdout.readline()))  # readable when the process has ended, reaped or not
        try:
            assert not select.select([worker], [], [], 0)[0]
            core.kill()
            core.wait(END_BOUND_S)
            assert select.select([worker], [], [], END_BOUND_S)[0]
        finally:
            os.close(worker)


def test_ctrl_c_shows_no_traceback(folder: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running_core() as core:
        bring_to("loading", core, folder)
        os.kill(core.worker.pid, signal.SIGINT)
        assert core.worker.wait(END_BOUND_S)
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_is_killed_is_seen_at_once(folder: pathlib.Path) -> None:
    with running_core() as core:
        bring_to("ready", core, folder)
        os.kill(core.worker.pid, signal.SIGKILL)
        assert core.worker.wait(END_BOUND_S)
        assert core.worker.exit_cause() == f"worker-0 (pid {core.worker.pid}) was killed by SIGKILL"
