"""What becomes of a graph that has no room; graphs themselves are captured in `tests/gpu/test_cuda_graphs.py`."""

import contextlib
import logging
from collections.abc import Iterator

import pytest
import torch

from folovllm.worker_proc.graph_memory import GraphMemory


class FakeStream:
    def wait_stream(self, _other: object) -> None:
        return


class FakeCuda:
    """The part of torch.cuda that capturing needs, and what was asked of it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextlib.contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        self.events.append("run")
        yield

    def new_graph(self) -> "FakeCuda":
        return self

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool == "pool" and capture_error_mode == "thread_local"
        self.events.append("record")

    def capture_end(self) -> None:
        self.events.append("end")

    def empty_cache(self) -> None:
        self.events.append("empty cache")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    for name in ("stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_step_is_run_once_then_recorded(cuda: FakeCuda) -> None:
    results = iter(["of the run", "of the recording"])
    captured = GraphMemory().capture(lambda: next(results))
    assert captured is not None and captured[1] == "of the recording"
    assert cuda.events == ["run", "run", "record", "end"]


def test_after_one_without_room_none_is_captured(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    memory = GraphMemory()
    calls: list[int] = []

    def compute() -> None:
        calls.append(len(calls))
        raise torch.OutOfMemoryError("Tried to allocate 3 GiB")

    with caplog.at_level(logging.WARNING):
        assert memory.capture(compute) is None
        assert memory.capture(compute) is None
    assert calls == [0] and cuda.events == ["run", "empty cache"]
    assert len(caplog.records) == 1 and "no memory left for a captured step (Tried" in caplog.records[0].getMessage()


def test_a_recording_that_fails_is_ended(cuda: FakeCuda) -> None:
    attempts = iter([None, torch.OutOfMemoryError("Tried to allocate 3 GiB")])

    def compute() -> None:
        if (error := next(attempts)) is not None:
            raise error

    assert GraphMemory().capture(compute) is None
    assert cuda.events == ["run", "run", "record", "end", "empty cache"]


def test_other_errors_are_nobodys_memory(cuda: FakeCuda) -> None:
    memory = GraphMemory()

    def compute() -> None:
        raise RuntimeError("a kernel does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        memory.capture(compute)
    assert memory.capture(lambda: 1) is not None and "empty cache" not in cuda.events
