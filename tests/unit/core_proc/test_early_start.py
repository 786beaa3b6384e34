"""The worker that is started before the core has imported itself."""

import os
import pathlib
import shutil
import stat
import time

import pytest

from folovllm.common.transport import make_runtime_dir
from folovllm.core_proc.early_start import EarlyStart, start_early
from folovllm.core_proc.worker_link import WorkerLink

MODULE = "tests.fakes.fake_worker"
BOUND_S = 20.0


def end(early: EarlyStart) -> None:
    if early.worker is not None:
        early.worker.close(BOUND_S)
    early.context.destroy(0)
    shutil.rmtree(early.runtime_dir)


def test_the_worker_runs_beside_the_parents_socket() -> None:
    folder = make_runtime_dir(os.getpid())
    started_at = time.time()
    early = start_early(f"ipc://{folder}/launch", MODULE, started_at)
    try:
        assert early.runtime_dir == folder
        assert early.failure is None
        assert early.worker is not None
        assert (folder / "worker-0").is_socket()
        assert early.worker.process.exit_code() is None
        assert (early.started_at, early.worker.number) == (started_at, 0)
        assert 0.0 <= early.seconds <= time.time() - started_at
    finally:
        end(early)


def test_a_parent_elsewhere_gets_a_folder_of_the_cores_own(tmp_path: pathlib.Path) -> None:
    early = start_early(f"ipc://{tmp_path}/launch", MODULE, time.time())
    try:
        assert early.runtime_dir != tmp_path
        assert stat.S_IMODE(early.runtime_dir.stat().st_mode) == 0o700
        assert not list(tmp_path.iterdir())
    finally:
        end(early)


def test_a_worker_that_cannot_start_is_no_error_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("folovllm.core_proc.worker_link.ChildProcess", refuse)
    early = start_early("ipc:///nowhere/launch", MODULE, time.time())
    try:
        assert early.worker is None
        assert isinstance(early.failure, OSError)
    finally:
        end(early)


def test_a_worker_that_was_told_nothing_is_ended_at_once_and_has_a_successor() -> None:
    early = start_early("ipc:///nowhere/launch", MODULE, time.time())
    first = early.worker
    assert isinstance(first, WorkerLink)
    try:
        first.close(BOUND_S)
        assert first.process.exit_code() == -9
        second = first.successor()
        assert second.number == 1
        assert (early.runtime_dir / "worker-1").is_socket()
        second.close(BOUND_S)
    finally:
        early.context.destroy(0)
        shutil.rmtree(early.runtime_dir)
