"""Children that end with their parent, and parents that know at once; also the signals of `stop_signals`."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from folovllm.common.child_process import ChildProcess
from tests.sources import ROOT

MODULE = "tests.fakes.child_program"
BOUND_S = 30.0


@contextmanager
def running_child(folder: pathlib.Path, mode: str) -> Iterator[ChildProcess]:
    """A child that has come as far as its mode lets it."""
    file = folder / "pid"
    child = ChildProcess(MODULE, [mode, str(file)], "the child")
    try:
        _wait_for(file, child)
        assert int(file.read_text()) == child.pid
        yield child
    finally:
        child.stop(0.0)


def _wait_for(file: pathlib.Path, child: ChildProcess) -> None:
    for _ in range(600):
        if file.exists() or child.wait(0.05):
            break
    assert file.exists(), child.exit_cause()


def test_the_sentinel_tells_the_end_and_the_cause(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "plain") as child:
        assert child.exit_code() is None
        assert child.exit_cause() == f"the child (pid {child.pid}) is running"
        assert not select.select([child.sentinel], [], [], 0)[0]
        os.kill(child.pid, signal.SIGKILL)
        assert select.select([child.sentinel], [], [], BOUND_S)[0]
        assert child.exit_code() == -signal.SIGKILL
        assert child.exit_cause() == f"the child (pid {child.pid}) was killed by SIGKILL"


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGRTMIN, "SIGRTMIN"), (signal.SIGRTMIN + 3, "SIGRTMIN+3")],
)
def test_every_signal_that_kills_has_a_name(tmp_path: pathlib.Path, number: int, name: str) -> None:
    with running_child(tmp_path, "plain") as child:
        os.kill(child.pid, number)
        assert child.wait(BOUND_S)
        assert child.exit_cause() == f"the child (pid {child.pid}) was killed by {name}"


def test_a_child_can_be_killed_without_waiting_and_twice(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "plain") as child:
        child.kill()
        assert child.wait(BOUND_S)
        child.kill()
        assert child.exit_code() == -signal.SIGKILL


def test_an_exit_code_is_told(tmp_path: pathlib.Path) -> None:
    child = ChildProcess(MODULE, ["exit-7", str(tmp_path / "pid")], "the child")
    assert child.wait(BOUND_S)
    assert child.exit_cause() == f"the child (pid {child.pid}) ended with exit code 7"
    assert child.stop(0.0) == 7
    assert child.stop(0.0) == 7


def test_a_child_that_listens_ends_in_order(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "orderly") as child:
        child.ask_to_stop()
        assert child.wait(BOUND_S)
        assert child.stop(0.0) == 0
        assert not (tmp_path / "pid.will").exists()


@pytest.mark.parametrize(("mode", "has_will"), [("orderly", False), ("stuck", True)])
def test_a_fork_that_lives_on_does_not_keep_the_child_from_ending(
    tmp_path: pathlib.Path, mode: str, has_will: bool
) -> None:
    with running_child(tmp_path, mode) as child:
        held_open = os.dup(child._death_write)  # as a fork has it
        try:
            assert child.stop(BOUND_S) == 0
        finally:
            os.close(held_open)
        assert (tmp_path / "pid.will").exists() == has_will


def test_a_child_that_is_stuck_ends_by_its_watch_after_its_last_will(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "stuck") as child:
        assert child.stop(BOUND_S) == 0
        assert (tmp_path / "pid.will").read_text() == "done"


def test_a_child_that_does_not_watch_is_killed_after_the_grace(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "plain") as child:
        assert child.stop(0.1) == -signal.SIGKILL


def test_stop_leaves_no_descriptor_and_no_thread(tmp_path: pathlib.Path) -> None:
    before = psutil.Process().num_fds()
    with running_child(tmp_path, "orderly") as child:
        assert _waiting_threads()
        child.stop(BOUND_S)
    assert psutil.Process().num_fds() <= before  # below, where something of an earlier test has been collected
    assert not _waiting_threads()


def _waiting_threads() -> list[str]:
    """By name: threads of other tests may end at any time."""
    return [thread.name for thread in threading.enumerate() if thread.name == "wait-the child"]


def test_a_program_that_cannot_be_started_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().num_fds()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        ChildProcess(MODULE, [], "the child")
    assert psutil.Process().num_fds() <= before


def test_a_command_that_no_system_can_start_raises() -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(ValueError, match="null byte"):
        ChildProcess(MODULE, ["mode", "a\0b"], "the child")
    assert psutil.Process().num_fds() <= before
    assert not _waiting_threads()


@pytest.mark.parametrize("mode", ["orderly", "stuck", "kernel"])
def test_a_killed_parent_takes_the_child_along(tmp_path: pathlib.Path, mode: str) -> None:
    """`kernel`: a child that neither polls nor watches is ended by the kernel."""
    code = f"""
        import signal
        from folovllm.common.child_process import ChildProcess
        child = ChildProcess({MODULE!r}, [{mode!r}, {str(tmp_path / "pid")!r}], "the child")
        print(child.pid, flush=True)
        signal.pause()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        for _ in range(600):
            if (tmp_path / "pid").exists():
                break
            parent_ended = _ended(parent)
            assert not parent_ended
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=BOUND_S)
    assert not alive


def _ended(parent: "subprocess.Popen[bytes]") -> bool:
    try:
        parent.wait(0.05)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_an_event_and_tells_the_exit_code(tmp_path: pathlib.Path, number: int, exit_code: int) -> None:
    with running_child(tmp_path, "signals") as child:
        os.kill(child.pid, number)
        os.kill(child.pid, number)  # changes nothing
        assert child.wait(BOUND_S)
        assert child.exit_code() == exit_code


def test_the_terminals_ctrl_c_does_not_reach_a_child(tmp_path: pathlib.Path) -> None:
    with running_child(tmp_path, "plain") as child:
        assert os.getsid(child.pid) == child.pid
