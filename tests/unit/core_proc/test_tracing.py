"""What is recorded of the scheduler's doors, and that a disk that is full ends the recording only."""

import logging
import pathlib

import pytest

from folovllm.common.log import ROOT_NAME
from folovllm.common.trace_file import (
    Arrived,
    CacheReset,
    Resulted,
    Scheduled,
    Stopped,
    TraceReader,
    TraceRecord,
    TraceWriter,
    WorkerLost,
    read_run,
)
from folovllm.core_proc.request import RequestStatus
from folovllm.core_proc.tracing import NO_STEP, FileSink, NoRecorder, Recorder, TraceRecorder
from tests.fakes.simulated_worker import integers
from tests.fakes.traced_engine import HEADER, ListSink, TracedEngine


def scheduled(engine: TracedEngine) -> list[Scheduled]:
    return [record for record in engine.records if isinstance(record, Scheduled)]


def results(engine: TracedEngine) -> list[Resulted]:
    return [record for record in engine.records if isinstance(record, Resulted)]


def test_one_request_from_its_arrival_to_its_end() -> None:
    engine = TracedEngine(depth=1, block_size=4)
    engine.add([3, 1, 4, 1, 5], max_tokens=4, stream=True, priority=2)
    engine.run()
    arrived, *steps_and_results = engine.records
    assert isinstance(arrived, Arrived)
    assert (arrived.request, arrived.request_id, arrived.max_tokens, arrived.priority) == (0, "r0", 4, 2)
    assert integers(arrived.prompt_token_ids) == [3, 1, 4, 1, 5]
    assert [type(record) for record in steps_and_results] == [Scheduled, Resulted] * 4
    first, *others = scheduled(engine)
    (admitted,) = first.admitted
    assert (admitted.slot, admitted.request, admitted.num_tokens, admitted.num_cached_tokens) == (0, 0, 5, 0)
    assert integers(admitted.block_ids) == [1, 2]
    assert first.slots is not None
    assert integers(first.num_scheduled_tokens) == [5]
    assert [step.slots for step in others] == [None] * 3, "the slots of the step before are not repeated"
    assert [integers(step.append_block_ids) for step in others] == [[], [], []]
    assert [len(result.token_ids) for result in results(engine)] == [4] * 4
    (ended,) = results(engine)[-1].ended
    assert (ended.request, ended.reason, ended.num_output_tokens) == (0, "length", 4)
    assert [result.num_free_blocks for result in results(engine)] == [62, 62, 62, 64]


def test_cache_hits_forks_and_blocks_show() -> None:
    engine = TracedEngine(depth=1, block_size=4)
    prompt = list(range(10))
    engine.add(prompt, max_tokens=1)
    engine.run()
    engine.add(prompt, n=2, max_tokens=2)
    engine.run()
    arrivals = [record for record in engine.records if isinstance(record, Arrived)]
    assert [(one.parent, one.sample_index, len(one.prompt_token_ids)) for one in arrivals] == [
        (None, 0, 40),
        (None, 0, 40),
        (1, 1, 0),
    ]
    admitted = [one for step in scheduled(engine) for one in step.admitted]
    assert [(one.request, one.num_cached_tokens) for one in admitted] == [(0, 0), (1, 8), (2, 9)]
    assert any(step.block_copies for step in scheduled(engine))


def test_preemption_and_coming_back_show() -> None:
    engine = TracedEngine(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=12, depth=2)
    for i in range(3):
        engine.add(6 + i, max_tokens=16)
    engine.run()
    preempted = [request for step in scheduled(engine) for request in step.preempted]
    assert len(preempted) == engine.scheduler.counters.num_preemptions > 0
    admitted = [one.request for step in scheduled(engine) for one in step.admitted]
    assert sorted(admitted) == sorted([0, 1, 2, *preempted])


def test_ends_from_outside_and_resets_show() -> None:
    engine = TracedEngine(depth=1)
    first, second = engine.add(3)[0], engine.add(4)[0]
    engine.schedule()
    engine.finish([first])
    engine.finish([first])  # has ended before: no record
    engine.finish([second], RequestStatus.FINISHED_TIMED_OUT)
    engine.reset_prefix_cache()
    engine.run()
    stopped = [record for record in engine.records if isinstance(record, Stopped)]
    assert [(one.ended[0].request, one.ended[0].reason) for one in stopped] == [(0, "abort"), (1, "timeout")]
    assert sum(isinstance(record, CacheReset) for record in engine.records) == 1


def test_the_end_of_a_worker_shows_with_those_who_lost_their_slots_and_the_suspects() -> None:
    engine = TracedEngine(depth=2)
    for i in range(3):
        engine.add(3 + i)
    engine.turn()
    engine.lose_worker(lambda lost: lost[:2])
    lost_s = engine.now_s
    engine.run()
    assert [record for record in engine.records if isinstance(record, WorkerLost)] == [
        WorkerLost(lost_s, preempted=[0, 1, 2], suspects=[0, 1])
    ]
    assert [one.request for step in scheduled(engine) for one in step.admitted][3:5] == [0, 1]


def test_a_pass_that_makes_no_step_is_recorded_only_if_somebody_lost_a_slot() -> None:
    engine = TracedEngine(depth=1)
    engine.add(3)
    engine.schedule()
    num_records = len(engine.records)
    engine.recorder.scheduled(None, 1.0)
    assert len(engine.records) == num_records
    request = engine.requests[0]
    engine.scheduler.counters.num_preemptions += 1
    request.become(RequestStatus.PREEMPTED, "test")
    engine.recorder.scheduled(None, 2.0)
    record = engine.records[-1]
    assert isinstance(record, Scheduled)
    assert (record.step_id, record.preempted) == (NO_STEP, [0])


def test_the_file_holds_what_was_recorded(tmp_path: pathlib.Path) -> None:
    engine = TracedEngine(depth=2)
    engine.add(3, stream=True)
    engine.add(9, n=2)
    engine.run()
    path = tmp_path / "trace"
    sink = FileSink(TraceWriter(path, HEADER))
    for record in engine.records:
        sink.write(record)
    sink.close()
    sink.close()
    assert read_run(TraceReader(path)) == (HEADER, engine.records)


class FullDisk:
    """A writer whose disk takes nothing."""

    path = "/full/trace"

    def write(self, _record: TraceRecord) -> None:
        raise OSError(28, "No space left on device")

    flush = close = lambda self: self.write(HEADER)


@pytest.mark.parametrize("door", ["write", "flush", "close"])
def test_a_full_disk_ends_the_recording_only(
    door: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(ROOT_NAME), "propagate", True)
    sink = FileSink(FullDisk())  # type: ignore[arg-type]
    for _ in range(3):
        if door == "write":
            sink.write(HEADER)
        else:
            getattr(sink, door)()
    (record,) = caplog.records
    assert "/full/trace cannot be written (No space left on device)" in record.getMessage()


def test_what_was_recorded_is_flushed_once_a_second() -> None:
    engine, sink = TracedEngine(), ListSink()
    recorder = TraceRecorder(engine.scheduler, engine.pool, sink)
    for now_s in (10.0, 10.5, 10.99, 11.0, 11.5, 12.5):
        recorder.flush(now_s)
    assert sink.num_flushes == 3


def test_an_engine_that_records_nothing_has_a_recorder_too() -> None:
    recorder: Recorder = NoRecorder()
    engine = TracedEngine()
    (request,) = engine.add(3)
    recorder.added(request, 0.0)
    recorder.scheduled(None, 0.0)
    recorder.stopped([request], 0.0)
    recorder.cache_reset(0.0)
    recorder.flush(0.0)
    engine.run()
    assert request.is_finished
