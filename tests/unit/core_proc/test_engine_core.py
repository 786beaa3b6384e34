"""The loop's order: what one turn does before what, when it sleeps, and that it never has too many steps in flight."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from folovllm.common.errors import EngineDeadError
from folovllm.common.log import ROOT_NAME
from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, SchedulerOutput
from folovllm.common.messages.frontend_core import (
    AddRequests,
    EngineCoreOutputs,
    EngineStats,
    GetStats,
    ResetPrefixCache,
    Welcome,
)
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, Hello, WorkerReady
from folovllm.common.transport import encode
from folovllm.core_proc import engine_core
from folovllm.core_proc.admission import Admission
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.engine_core import EngineCore
from folovllm.core_proc.executor import WorkerLost
from folovllm.core_proc.frontends import Frontends
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.observer import Observer
from folovllm.core_proc.recovery import Recovery
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import Scheduler
from folovllm.core_proc.supervisor import Supervisor
from tests.fakes.fake_frontend import make_request
from tests.fakes.fake_router import FakeRouter
from tests.fakes.fake_worker import FakeModel, expected_output, ints

BLOCK_SIZE = 4


class FakeWaiter:
    """Gives the sources that the test put there; keeps the time-outs it was asked to wait with."""

    def __init__(self) -> None:
        self.sources: list[object] = []
        self.timeouts: list[int | None] = []

    def wait(self, timeout_ms: int | None) -> list[object]:
        self.timeouts.append(timeout_ms)
        return self.sources


class FakeExecutor:
    """A worker that answers when it is collected from; `events` is shared with the router's log of sends."""

    def __init__(self, events: list[str]) -> None:
        self.socket = object()
        self.is_ready = True
        self.num_restarts = 0
        self.happens: WorkerReady | WorkerLost | None = None
        self.steps: list[SchedulerOutput] = []
        self._model = FakeModel(BLOCK_SIZE)
        self._events = events

    @property
    def num_in_flight(self) -> int:
        return len(self.steps)

    @property
    def tick_ms(self) -> int | None:
        return 1000 if self.steps else None

    def restart(self, _now_s: float) -> None:
        self._events.append("restart")
        self.steps.clear()
        self._model = FakeModel(BLOCK_SIZE)
        self.is_ready = False

    def submit(self, step: SchedulerOutput, _now_s: float) -> None:
        self._events.append("submit")
        self.steps.append(step)

    def collect(self) -> Iterator[ModelRunnerOutput]:
        yield self._model.execute(self.steps.pop(0))

    def check(self, _sources: list[object], _now_s: float) -> WorkerReady | WorkerLost | None:
        assert len(self.steps) <= 2
        happens, self.happens = self.happens, None
        return happens


class LoggingRouter(FakeRouter):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def send_multipart(self, frames: list[bytes], _flags: int) -> None:
        super().send_multipart(frames, _flags)
        self._events.append(type(self.sent[-1][1]).__name__)


class FakeParentLink:
    socket = object()


class Turns:
    """An engine of fakes and what it did."""

    def __init__(self, depth: int, log_interval_s: float = 0.0) -> None:
        self.events: list[str] = []
        self.waiter, self.router, self.executor = FakeWaiter(), LoggingRouter(self.events), FakeExecutor(self.events)
        self.pool = BlockPool(64)
        self.scheduler = Scheduler(
            kv_cache_manager=KVCacheManager(self.pool, BLOCK_SIZE),
            queue=RequestQueue("fcfs"),
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=128,
        )
        admission = Admission(
            max_model_len=128,
            num_valid_token_ids=1000,
            num_pool_tokens=63 * BLOCK_SIZE,
            max_num_seqs=4,
            max_num_queued_reqs=10,
            max_num_queued_tokens=None,
        )
        welcome = Welcome("m", 128, 1000, BLOCK_SIZE, 63, 4, "fake", "float32", "0")
        frontends = Frontends(self.router, welcome)  # type: ignore[arg-type]
        observer = Observer(
            scheduler=self.scheduler,
            pool=self.pool,
            frontends=frontends,
            executor=self.executor,  # type: ignore[arg-type]
            log_interval_s=log_interval_s,
        )
        recovery = Recovery(
            executor=self.executor,  # type: ignore[arg-type]
            scheduler=self.scheduler,
            supervisor=Supervisor(3, 0.0),
            recorder=observer.recorder,
        )
        self.engine = EngineCore(
            waiter=self.waiter,  # type: ignore[arg-type]
            parent=FakeParentLink(),  # type: ignore[arg-type]
            frontends=frontends,
            admission=admission,
            scheduler=self.scheduler,
            recovery=recovery,
            observer=observer,
            pipeline_depth=depth,
        )

    def turn(self, *sources: object) -> list[str]:
        """One step with these sources readable; what was submitted and sent, Pings left out."""
        self.events.clear()
        self.waiter.sources = list(sources)
        self.engine.step()
        return [event for event in self.events if event != "Ping"]

    def connect(self) -> None:
        self.router.incoming.append([b"a", encode(Hello("frontend", PROTOCOL_VERSION, 1, "a"))])
        assert self.turn(self.router) == ["Welcome"]

    def add(self, number: int, max_tokens: int, **others: object) -> None:
        request = make_request(number, [1, 2, 3], max_tokens, stream=True, **others)
        self.router.incoming.append([b"a", encode(AddRequests([request]))])


@pytest.mark.parametrize("depth", [1, 2])
def test_the_next_step_goes_out_before_the_outputs(depth: int) -> None:
    turns = Turns(depth)
    turns.connect()
    turns.add(1, 5)
    assert turns.turn(turns.router) == ["submit"] * depth
    assert turns.turn(turns.executor.socket) == ["submit", "EngineCoreOutputs"]
    assert turns.executor.num_in_flight == depth


def test_a_new_request_joins_while_steps_are_in_flight() -> None:
    turns = Turns(2)
    turns.connect()
    turns.add(1, 9)
    turns.turn(turns.router)
    turns.add(2, 9)
    assert turns.turn(turns.router) == []  # two are in flight
    assert turns.turn(turns.executor.socket) == ["submit", "EngineCoreOutputs"]
    assert turns.executor.steps[-1].new_requests


def test_a_worker_that_ends_is_replaced_and_the_answers_go_on() -> None:
    turns = Turns(2)
    turns.connect()
    turns.add(1, 5)
    turns.turn(turns.router)
    turns.turn(turns.executor.socket)
    turns.executor.happens = WorkerLost("worker-0 was killed by SIGKILL", None, was_ready=True)
    assert turns.turn() == ["restart"]
    assert (turns.scheduler.num_running, turns.scheduler.num_waiting) == (0, 1)
    turns.add(2, 3)
    assert turns.turn(turns.router) == []  # queued as usual
    turns.executor.is_ready = True
    assert turns.turn() == ["submit", "submit"]
    while turns.scheduler.has_unfinished:
        turns.turn(turns.executor.socket)
    streamed = {1: b"", 2: b""}
    for _, message in turns.router.sent:
        if isinstance(message, EngineCoreOutputs):
            numbers = np.frombuffer(message.numbers, "<i4").tolist()
            for number, token_id in zip(numbers, np.frombuffer(message.token_ids, "<i4"), strict=True):
                streamed[number] += token_id.tobytes()
    for number, num_tokens in ((1, 5), (2, 3)):
        assert ints(streamed[number]) == expected_output([1, 2, 3], num_tokens, SamplingRow())


def test_a_request_that_ends_workers_fails_alone() -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(1, 5)
    turns.turn(turns.router)
    for crash in range(3):
        turns.executor.happens = WorkerLost("gone", None, was_ready=True)
        sent = turns.turn()
        assert sent == (["restart", "EngineCoreOutputs"] if crash == 2 else ["restart"])
        turns.executor.is_ready = True
        turns.turn()
    last = turns.router.sent[-1][1]
    assert isinstance(last, EngineCoreOutputs)
    assert last.finished[0].error == "it was in flight at 3 ends of the worker, alone at the last one (gone)"
    assert not turns.scheduler.has_unfinished


def test_too_many_ends_are_the_engines() -> None:
    turns = Turns(1)
    for _ in range(3):
        turns.executor.happens = WorkerLost("gone", None, was_ready=True)
        turns.turn()
    turns.executor.happens = WorkerLost("gone", None, was_ready=False)
    with pytest.raises(EngineDeadError, match=r"gone \(4 workers in a row have ended, and max_worker_restarts=3\)"):
        turns.turn()


def test_the_process_sleeps_without_a_bound_only_where_nothing_can_become_due() -> None:
    turns = Turns(2)
    turns.turn()
    turns.connect()
    turns.turn()
    turns.add(1, 5)
    turns.turn(turns.router)
    turns.turn()
    assert turns.waiter.timeouts == [None, None, 1000, 1000, 1000]


class Clock:
    """Stands for the module `time`; a test says what it is."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_core, "time", clock)
    return clock


def ends_of(turns: Turns) -> dict[int, str]:
    outputs = [message for _, message in turns.router.take() if isinstance(message, EngineCoreOutputs)]
    return {finished.number: finished.finish_reason for message in outputs for finished in message.finished}


def test_a_time_limit_ends_requests_wherever_they_are(clock: Clock) -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(0, 50, timeout_s=2.0, n=2)  # the second waits for the first one's prompt, in no queue
    turns.add(2, 50, timeout_s=2.5)
    turns.add(3, 50)
    turns.add(4, 50, timeout_s=3.0)
    turns.add(5, 50, timeout_s=3.0)
    turns.turn(turns.router)
    assert (turns.scheduler.num_running, turns.scheduler.num_waiting) == (4, 2)
    clock.now_s = 101.999
    assert turns.turn() == []
    clock.now_s = 102.0
    assert turns.turn() == ["EngineCoreOutputs"]
    assert ends_of(turns) == {0: "timeout", 1: "timeout"}
    clock.now_s = 103.5
    turns.turn()
    assert ends_of(turns) == {2: "timeout", 4: "timeout", 5: "timeout"}
    assert (turns.scheduler.num_running, turns.scheduler.num_waiting) == (1, 0)
    assert turns.pool.num_free == turns.pool.num_usable - 1
    while turns.scheduler.has_unfinished:
        turns.turn(turns.executor.socket)
    assert ends_of(turns) == {3: "length"}


def test_a_time_limit_comes_after_the_tokens_that_came_in_time(clock: Clock) -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(1, 2, timeout_s=1.0)
    turns.add(2, 1, timeout_s=1.0)
    turns.turn(turns.router)
    clock.now_s = 200.0
    assert turns.turn(turns.executor.socket) == ["EngineCoreOutputs"] * 2
    tokens, ends = (message for _, message in turns.router.take() if isinstance(message, EngineCoreOutputs))
    assert len(tokens.numbers) == 8
    assert [(end.number, end.finish_reason) for end in tokens.finished] == [(2, "length")]
    assert [(end.number, end.finish_reason) for end in ends.finished] == [(1, "timeout")]
    assert not turns.scheduler.has_unfinished


def test_the_process_wakes_up_for_the_next_time_limit(clock: Clock) -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(1, 50, timeout_s=0.25)
    turns.turn(turns.router)
    for clock.now_s in (100.0, 100.2, 100.3, 100.4):
        turns.turn()
    assert turns.waiter.timeouts[-4:] == [250, 50, 0, 1000]


def test_the_cache_is_emptied_on_request_and_the_state_told() -> None:
    turns = Turns(1)
    turns.connect()
    turns.router.incoming.append([b"a", encode(AddRequests([make_request(1, list(range(9)), 1)]))])
    turns.turn(turns.router)
    turns.turn(turns.executor.socket)
    turns.router.incoming += [[b"a", encode(GetStats(7))], [b"a", encode(ResetPrefixCache(8))]]
    assert turns.turn(turns.router) == ["EngineStats"] * 2
    before, after = (message for _, message in turns.router.sent[-2:])
    assert isinstance(before, EngineStats)
    assert isinstance(after, EngineStats)
    assert (before.ticket, before.num_cached_blocks, before.num_cache_queries_total) == (7, 2, 9)
    assert (after.ticket, after.num_cached_blocks, after.num_evicted_blocks_total) == (8, 0, 0)


def test_a_line_about_the_state_is_logged_while_there_is_work(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(ROOT_NAME), "propagate", True)
    caplog.set_level(logging.INFO, ROOT_NAME)
    turns = Turns(1, log_interval_s=5.0)
    turns.connect()
    turns.add(1, 3)
    turns.turn(turns.router)
    for clock.now_s in (103.0, 106.0, 109.0, 112.0, 118.0):
        turns.turn(*([turns.executor.socket] if turns.executor.steps else []))
    lines = [record.getMessage() for record in caplog.records if "Running" in record.getMessage()]
    assert [line.split(", ")[0] for line in lines] == ["Running: 1 reqs", "Running: 0 reqs"]
    assert (
        "KV cache usage: 3.2 %, Prefix cache hit rate: 0.0 %, Prompt: 0.5 tokens/s, Generation: 0.3 tokens/s"
        in lines[0]
    )
    assert "usage: 0.0 %, Prefix cache hit rate: -, Prompt: 0.0 tokens/s, Generation: 0.2 tokens/s" in lines[1]


def test_invariants_are_checked_once_after_a_quiet_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(1, 1)
    turns.turn(turns.router)
    assert turns.turn(turns.executor.socket) == ["EngineCoreOutputs"]
    turns.pool.allocate(1)  # a block that no request holds
    monkeypatch.setattr(logging.getLogger(ROOT_NAME), "propagate", True)
    turns.turn(turns.router)  # not quiet
    assert not caplog.records
    turns.turn()
    turns.turn()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "do not add up" in caplog.text


def test_what_needs_no_step_is_answered_at_once() -> None:
    turns = Turns(1)
    turns.connect()
    turns.add(1, 0)
    turns.add(2, -1)
    assert turns.turn(turns.router) == ["EngineCoreOutputs"] * 2
    first, second = (message for _, message in turns.router.sent[-2:])
    assert isinstance(first, EngineCoreOutputs)
    assert isinstance(second, EngineCoreOutputs)
    assert first.finished[0].finish_reason == "length"
    assert second.rejected[0].field == "max_tokens"
