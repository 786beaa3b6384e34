"""`EngineProcess` with a fake core program: ready, each way to fail, and nothing left behind."""

import os
import pathlib
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import psutil
import pytest

from folovllm.common.config import EngineConfig
from folovllm.common.errors import EngineStartError
from folovllm.frontend import engine_process
from folovllm.frontend.core_client import CoreClient
from folovllm.frontend.engine_process import ChildTraceback, EngineProcess, sweep_stale_runtime_dirs

FAKE_CORE = "tests.fakes.fake_core_for_frontend"
ROOT = pathlib.Path(__file__).resolve().parents[3]


def config(kind: str) -> EngineConfig:
    return EngineConfig(model=f"/models/{kind}-model")


def test_it_starts_serves_and_stops() -> None:
    engine = EngineProcess(FAKE_CORE)
    ready = engine.wait_ready(config("serve"))
    assert stat.S_IMODE(engine.runtime_dir.stat().st_mode) == 0o700
    assert [phase.phase for phase in ready.phases] == ["bind", "load weights"]
    client = CoreClient(ready.endpoint, engine=engine)
    assert client.welcome.model == "/models/serve-model"
    client.close()
    assert engine.failure() is None
    engine.stop()
    engine.stop()
    assert not psutil.pid_exists(engine.pid)
    assert not engine.runtime_dir.exists()
    assert "stopped" in str(engine.failure())


def test_it_listens_where_it_is_told(tmp_path: pathlib.Path) -> None:
    engine = EngineProcess(FAKE_CORE)
    try:
        assert engine.wait_ready(config("serve"), listen=f"ipc://{tmp_path}/here").endpoint == f"ipc://{tmp_path}/here"
    finally:
        engine.stop()


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_killed_cores_socket_file_is_removed_unless_another_engine_has_it(
    tmp_path: pathlib.Path, taken_over: bool
) -> None:
    path = tmp_path / "here"
    engine = EngineProcess(FAKE_CORE)
    engine.wait_ready(config("serve"), listen=f"ipc://{path}")
    os.kill(engine.pid, signal.SIGKILL)
    assert select.select([engine.sentinel], [], [], 30.0)[0]
    assert path.is_socket()
    with socket.socket(socket.AF_UNIX) as other:
        if taken_over:
            path.unlink()
            other.bind(str(path))
            other.listen()
        engine.stop()
        assert path.exists() == taken_over


def test_the_childs_own_cause_is_raised_with_its_traceback() -> None:
    engine = EngineProcess(FAKE_CORE)
    with pytest.raises(EngineStartError, match=r"^ModelError in worker-0: no such tensor: lm_head\.weight") as caught:
        engine.wait_ready(config("fail"))
    assert isinstance(caught.value.__cause__, ChildTraceback)
    assert "Traceback: of the worker" in str(caught.value.__cause__)
    engine.stop()


def test_a_child_that_exits_is_noticed_at_once() -> None:
    engine = EngineProcess(FAKE_CORE)
    with pytest.raises(EngineStartError, match=r"core \(pid \d+\) ended with exit code 7 before it was ready"):
        engine.wait_ready(config("exit"))
    engine.stop()


def test_a_program_that_does_not_exist_is_named() -> None:
    engine = EngineProcess("tests.fakes.no_such_core")
    with pytest.raises(EngineStartError, match="ended with exit code 1"):
        engine.wait_ready(config("serve"))
    engine.stop()


def test_a_core_that_is_killed_in_use_is_noticed_at_once() -> None:
    engine = EngineProcess(FAKE_CORE)
    engine.wait_ready(config("serve"))
    os.kill(engine.pid, signal.SIGKILL)
    assert select.select([engine.sentinel], [], [], 30.0)[0]
    assert "was killed by SIGKILL" in str(engine.failure())
    engine.stop()
    assert not engine.runtime_dir.exists()


def test_L35_an_interrupted_start_leaves_nothing() -> None:
    engine = EngineProcess(FAKE_CORE)
    with pytest.raises(KeyboardInterrupt):
        engine.wait_ready(config("interrupt"))  # by the core, so that it comes in here, and not into the next test
    engine.stop()
    assert not psutil.pid_exists(engine.pid)
    assert not engine.runtime_dir.exists()


def test_L35_an_interruption_while_the_child_is_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    join = threading.Thread.join
    calls = iter(range(100))

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "start-core" and next(calls) == 0:
            raise KeyboardInterrupt
        join(self, timeout)

    before = {child.pid for child in psutil.Process().children()}
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            EngineProcess(FAKE_CORE)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert not list(pathlib.Path(tempfile.gettempdir()).glob(f"folovllm-{os.getpid()}-*"))


SCRIPT = f"""
import sys
from folovllm.common.config import EngineConfig
from folovllm.frontend.engine_process import EngineProcess
engine = EngineProcess({FAKE_CORE!r})
engine.wait_ready(EngineConfig(model="/models/serve"))
print(engine.pid, engine.runtime_dir, flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["forget", "error", "SIGTERM", "SIGKILL"])
def test_L37_a_script_without_guard_and_close_leaves_nothing(end: str) -> None:
    argument = {"forget": "forget", "error": "error"}.get(end, "wait")
    script = SCRIPT + ("raise SystemExit(3)" if end == "error" else "")
    with subprocess.Popen(
        [sys.executable, "-c", script, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid, runtime_dir = process.stdout.readline().split()
        core = psutil.Process(int(pid)) if psutil.pid_exists(int(pid)) else None
        if argument == "wait":
            process.send_signal(signal.Signals[end])
        process.wait(60)
        if core is not None:
            psutil.wait_procs([core], timeout=30)
            assert not core.is_running()
    if end != "SIGKILL":  # a killed parent cannot remove it; the real core does, and so does the next start
        assert end == "SIGTERM" or not pathlib.Path(runtime_dir).exists()
    sweep_stale_runtime_dirs()
    assert not pathlib.Path(runtime_dir).exists()


def test_the_sweep_spares_what_is_alive(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("folovllm-1111-dead", "folovllm-2222-alive", "folovllm-x-other", "other-1111-x")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "launch").touch()
    (tmp_path / "folovllm-1111-link").symlink_to(tmp_path / "other-1111-x")
    sweep_stale_runtime_dirs(is_alive=lambda pid: pid == 2222)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"folovllm-2222-alive", "folovllm-x-other", "other-1111-x", "folovllm-1111-link"}


def test_the_sweep_spares_a_folder_whose_socket_is_served() -> None:
    engine = EngineProcess(FAKE_CORE)
    sweep_stale_runtime_dirs(is_alive=lambda pid: pid != os.getpid())  # as seen from another container
    assert engine.runtime_dir.exists()
    engine.stop()


def test_whether_a_process_lives() -> None:
    assert engine_process._is_alive(os.getpid())
    assert engine_process._is_alive(1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(60)
    assert not engine_process._is_alive(child.pid)
