"""What ends a wait of the worker's main thread, besides a frame of the core."""

import os
import pathlib
from collections.abc import Iterator
from typing import NoReturn

import pytest

from folovllm.common.errors import EngineError
from folovllm.common.stop_signals import StopRequested
from folovllm.worker_proc.core_link import CoreLink


class Signals:
    """SIGTERM, once the test sends it."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()

    def send(self) -> None:
        os.write(self._write, b"x")

    def exit_code(self) -> int:
        return 143

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write)


@pytest.fixture
def signals() -> Iterator[Signals]:
    signals = Signals()
    yield signals
    signals.close()


@pytest.fixture
def link(tmp_path: pathlib.Path, signals: Signals) -> Iterator[CoreLink]:
    link = CoreLink(f"ipc://{tmp_path}/core", "worker-7", signals, None)  # type: ignore[arg-type]
    yield link
    link.close()


def test_a_watched_descriptor_ends_every_wait(link: CoreLink) -> None:
    def fail() -> NoReturn:
        raise EngineError("the other thread is gone")

    readable, end = os.pipe()
    link.watch(readable, fail)
    link.check_stop()
    os.close(end)
    for wait in (link.check_stop, link.receive_step):
        with pytest.raises(EngineError, match="the other thread is gone"):
            wait()
    os.close(readable)


def test_a_signal_ends_the_wait(link: CoreLink, signals: Signals) -> None:
    link.check_stop()
    signals.send()
    with pytest.raises(StopRequested) as stop:
        link.receive_step()
    assert stop.value.exit_code == 143


def test_a_wait_with_a_bound_ends_without_a_step(link: CoreLink) -> None:
    assert link.receive_step(0) is None
