"""Makes every decision of a recorded run again, without a model, and says where it comes out differently.

    python -m folovllm.core_proc.replay FILE [--run N]

A real scheduler is told what the recorded one was told, in the same order and at the same times (they are arguments),
and recorded in the same way; then the records must be the same. Where prompts are sized for a target (`target_itl_ms`)
the fit of step times is arithmetic in floats: on another processor it may differ in a last digit.

Exit codes: 0 the same decisions, 1 a difference, 2 a file that cannot be used.
"""

import argparse
import sys

import msgspec
import numpy as np

from folovllm.common.errors import ConfigError, ProtocolError
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.common.trace_file import (
    Arrived,
    CacheReset,
    Resulted,
    Scheduled,
    Stopped,
    TraceHeader,
    TraceReader,
    TraceRecord,
    WorkerLost,
    read_run,
)
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import ChunkBounds, Scheduler
from folovllm.core_proc.tracing import TraceRecorder


class _Memory:
    """A sink that keeps the records until they are taken."""

    def __init__(self) -> None:
        self._records: list[TraceRecord] = []

    def write(self, record: TraceRecord) -> None:
        self._records.append(record)

    def flush(self) -> None:
        return

    def take(self) -> list[TraceRecord]:
        records, self._records = self._records, []
        return records


class _Grammar:
    """Has a mask whenever the recorded request had one."""

    mask: bytes | None = b""

    def advance(self, _token_id: int) -> None:
        self.mask = None


class Replay:
    """One run, made again record by record."""

    def __init__(self, header: TraceHeader) -> None:
        pool = BlockPool(header.num_blocks + 1)
        self._scheduler = Scheduler(
            kv_cache_manager=KVCacheManager(
                pool, header.block_size, enable_prefix_caching=header.enable_prefix_caching
            ),
            queue=RequestQueue(header.scheduling_policy),
            max_num_seqs=header.max_num_seqs,
            max_num_batched_tokens=header.max_num_batched_tokens,
            max_model_len=header.max_model_len,
            bounds=ChunkBounds(
                header.long_prefill_token_threshold, header.max_num_partial_prefills, header.target_itl_s
            ),
        )
        self._memory = _Memory()
        self._recorder = TraceRecorder(self._scheduler, pool, self._memory)
        self._requests: dict[int, Request] = {}
        self._grammars: dict[int, _Grammar] = {}  # by the requests' numbers
        self._slots: set[int] = set()  # of the recorded step

    def apply(self, record: TraceRecord) -> str:
        """Goes through the door that the record tells of; says what came out differently, "" if nothing did."""
        try:
            self._go_through(record)
        except (ProtocolError, KeyError) as error:
            return f"{_name(record)} is not possible here: {type(error).__name__}: {error}"
        made = self._memory.take()
        return "" if made == [record] else _difference(record, made)

    def _go_through(self, record: TraceRecord) -> None:
        match record:
            case Arrived():
                self._add(record)
            case Scheduled():
                self._fill_masks(record)
                self._recorder.scheduled(self._scheduler.schedule(record.time_s), record.time_s)
            case Resulted():
                output = ModelRunnerOutput(
                    record.step_id,
                    record.token_ids,
                    record.no_token_rows,
                    record.error,
                    max_num_tokens=record.max_num_tokens,
                )
                outcome = self._scheduler.update_from_output(output, record.time_s)
                self._recorder.updated(output, outcome.finished, record.time_s)
            case Stopped():
                requests = [self._requests[ended.request] for ended in record.ended]
                status = RequestStatus(record.ended[0].reason)
                ended = self._scheduler.finish_requests(requests, status, record.time_s, record.error)
                self._recorder.stopped(ended, record.time_s)
            case CacheReset():
                self._scheduler.reset_prefix_cache()
                self._recorder.cache_reset(record.time_s)
            case WorkerLost():
                suspects = [self._requests[number] for number in record.suspects]
                self._scheduler.lose_worker()
                self._scheduler.run_alone(suspects)
                self._recorder.worker_lost(suspects, record.time_s)

    def _fill_masks(self, record: Scheduled) -> None:
        """Whoever was in the step had its mask. One that waits has it too: there it is seldom missing."""
        if record.slots is not None and record.step_id >= 0:  # a pass without a step leaves the last step's slots
            self._slots = set(np.frombuffer(record.slots, "<i4").tolist())
        for number, grammar in self._grammars.items():
            slot = self._requests[number].slot
            is_in_step = record.step_id < 0 or slot is None or slot in self._slots
            grammar.mask = b"" if is_in_step else None

    def _add(self, record: Arrived) -> None:
        parent = None if record.parent is None else self._requests[record.parent]
        prompt = np.frombuffer(record.prompt_token_ids, "<i4") if parent is None else parent.prompt_token_ids
        request = Request(
            client=record.client,
            number=record.number,
            request_id=record.request_id,
            prompt_token_ids=prompt,
            sampling=record.sampling,
            max_tokens=record.max_tokens,
            priority=record.priority,
            stream=record.stream,
            arrival_s=record.time_s,
            sample_index=record.sample_index,
            parent=parent,
            cache_salt=record.cache_salt,
            skip_reading_prefix_cache=record.skip_reading_prefix_cache,
        )
        if record.has_grammar:
            request.grammar = self._grammars[record.request] = _Grammar()
        self._scheduler.add_request(request)
        self._requests[record.request] = request
        self._recorder.added(request, record.time_s)


def replay(header: TraceHeader, records: list[TraceRecord]) -> tuple[int, str]:
    """How many steps were made again, and what came out differently ("" if nothing did)."""
    again, num_steps = Replay(header), 0
    for record in records:
        difference = again.apply(record)
        if difference:
            return num_steps, difference
        num_steps += isinstance(record, Scheduled)
    return num_steps, ""


def _difference(record: TraceRecord, made: list[TraceRecord]) -> str:
    if len(made) != 1 or type(made[0]) is not type(record):
        return f"{_name(record)} was recorded; now: {', '.join(map(_name, made)) or 'nothing'}"
    then, now = (msgspec.structs.asdict(one) for one in (record, made[0]))
    fields = [f"{name}: {_shown(then[name])}, now {_shown(now[name])}" for name in then if then[name] != now[name]]
    return f"{_name(record)} came out differently; {'; '.join(fields)}"


def _name(record: TraceRecord) -> str:
    match record:
        case Scheduled() | Resulted():
            what = "step" if isinstance(record, Scheduled) else "the result of step"
            return f"{what} {record.step_id} at {record.time_s:.6f} s"
        case Arrived():
            return f"the arrival of request {record.request}"
        case Stopped():
            return f"the end of {len(record.ended)} requests at {record.time_s:.6f} s"
        case CacheReset():
            return f"the reset of the cache at {record.time_s:.6f} s"
        case WorkerLost():
            return f"the end of a worker at {record.time_s:.6f} s"
        case TraceHeader():
            return "a run's begin"


def _shown(value: object) -> str:
    if isinstance(value, bytes) and len(value) % 4 == 0:
        value = np.frombuffer(value, "<i4").tolist()
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def main() -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.core_proc.replay")
    parser.add_argument("file", help="a trace")
    parser.add_argument("--run", type=int, help="1 for the file's first run [the last]")
    options = parser.parse_args()
    try:
        reader = TraceReader(options.file)
        header, records = read_run(reader, options.run)
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    if reader.problem:
        sys.stderr.write(f"Note: {reader.problem}; replayed up to there\n")
    num_steps, difference = replay(header, records)
    num_requests = sum(isinstance(record, Arrived) for record in records)
    if difference:
        sys.stdout.write(f"After {num_steps} steps: {difference}\n")
        return 1
    sys.stdout.write(f"{num_steps} steps of {num_requests} requests made again: the same decisions\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
