"""The file in which the core records what its scheduler is told and what it decides: format, writer, reader.

A file holds one or more runs of an engine, each begun by a TraceHeader. Behind eight bytes that name the format each
record is its length (uint32, little-endian) and so many bytes of MessagePack. A file may be appended to, and cut
anywhere: what is whole up to the cut can be read. It holds the token ids of prompts and answers.

All of a run's records together are enough to make every decision again (`python -m folovllm.core_proc.replay`). Times
are seconds on the core's clock, `request` is the order of arrival from 0 on.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Final

import msgspec

from folovllm.common.config import SchedulingPolicy
from folovllm.common.errors import ConfigError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import FinishReason

TRACE_VERSION: Final = 1
_MAGIC: Final = b"FOLOTRC\n"
_LENGTH_BYTES: Final = 4
_MAX_RECORD_BYTES: Final = 2**30  # a longer one is no record but damage


class _Record(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    pass


class TraceHeader(_Record, frozen=True, tag="run"):
    """The begin of a run: an engine's options, as far as decisions depend on them.

    Attributes:
        version: of this format.
        folovllm_version: FoloVLLM's version in the core.
        model: folder of the model.
        started_at: seconds since 1970.
        block_size: tokens in one KV block.
        num_blocks: usable KV blocks; they are numbered from 1.
        max_num_seqs, max_num_batched_tokens, max_model_len, scheduling_policy, enable_prefix_caching,
        long_prefill_token_threshold, max_num_partial_prefills, pipeline_depth: as in EngineConfig, resolved.
        target_itl_s: seconds.
    """

    version: int
    folovllm_version: str
    model: str
    started_at: float
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    scheduling_policy: SchedulingPolicy
    enable_prefix_caching: bool
    long_prefill_token_threshold: int | None
    max_num_partial_prefills: int | None
    target_itl_s: float | None
    pipeline_depth: int


class Arrived(_Record, frozen=True, tag="arrived"):
    """A request was taken into the queue.

    Attributes:
        time_s: when.
        request: its number in this run; requests arrive in the order of these.
        request_id: the user's name for it.
        client, number: the frontend it came from, and that frontend's number for it.
        prompt_token_ids: int32 bytes; empty where `parent` has the same.
        sampling: how it is sampled.
        max_tokens, priority, stream, cache_salt, skip_reading_prefix_cache: as in EngineCoreRequest.
        parent: the first of the answers to the same prompt, None for that one itself.
        sample_index: which of these answers it is.
        has_grammar: whether its text is held to a grammar: then it waits for masks, at moments that no rule gives.
    """

    time_s: float
    request: int
    request_id: str
    client: int
    number: int
    prompt_token_ids: bytes
    sampling: SamplingRow
    max_tokens: int
    priority: int = 0
    stream: bool = False
    cache_salt: str = ""
    skip_reading_prefix_cache: bool = False
    parent: int | None = None
    sample_index: int = 0
    has_grammar: bool = False


class Admitted(_Record, frozen=True):
    """A request that got a slot.

    Attributes:
        slot: its row.
        request: who it is.
        num_tokens: tokens that are known: its prompt and, after preemption, its output.
        num_cached_tokens: those of them that were taken over from shared blocks.
        block_ids: int32 bytes; its blocks in order, shared ones included.
    """

    slot: int
    request: int
    num_tokens: int
    num_cached_tokens: int
    block_ids: bytes


class Scheduled(_Record, frozen=True, tag="step"):
    """A step was made; or none was, but requests lost their slots (`step_id` is -1).

    Attributes:
        time_s: when.
        step_id: counts up by one.
        slots: int32 bytes, as in SchedulerOutput; None where they are those of the step before.
        num_scheduled_tokens, append_slots, append_block_ids, block_copies: as in SchedulerOutput.
        admitted: requests that got a slot.
        preempted: requests that lost theirs, before anybody got one.
        num_free_blocks: free blocks afterwards.
    """

    time_s: float
    step_id: int
    slots: bytes | None
    num_scheduled_tokens: bytes
    num_free_blocks: int
    append_slots: bytes = b""
    append_block_ids: bytes = b""
    block_copies: bytes = b""
    admitted: list[Admitted] = []
    preempted: list[int] = []


class Ended(_Record, frozen=True):
    """A request that ended.

    Attributes:
        request: who.
        reason: why.
        num_output_tokens: tokens of its answer.
    """

    request: int
    reason: FinishReason
    num_output_tokens: int


class Resulted(_Record, frozen=True, tag="result"):
    """The result of a step was taken in.

    Attributes:
        time_s: when.
        step_id: the step's.
        token_ids, no_token_rows, error, max_num_tokens: as in ModelRunnerOutput.
        ended: requests that ended by it.
        num_free_blocks: free blocks afterwards.
    """

    time_s: float
    step_id: int
    token_ids: bytes
    num_free_blocks: int
    no_token_rows: bytes = b""
    error: str = ""
    ended: list[Ended] = []
    max_num_tokens: int = 0


class Stopped(_Record, frozen=True, tag="stopped"):
    """Requests were ended from outside: aborted, or out of time.

    Attributes:
        time_s: when.
        ended: who.
        num_free_blocks: free blocks afterwards.
        error: text for the reason "error".
    """

    time_s: float
    ended: list[Ended]
    num_free_blocks: int
    error: str = ""


class CacheReset(_Record, frozen=True, tag="reset"):
    """The prefix cache was emptied.

    Attributes:
        time_s: when.
    """

    time_s: float


class WorkerLost(_Record, frozen=True, tag="lost"):
    """The worker ended; another one computes anew what it held. Steps without a result have none.

    Attributes:
        time_s: when.
        preempted: requests that lost their slots.
        suspects: requests that run alone from now on, in this order.
    """

    time_s: float
    preempted: list[int] = []
    suspects: list[int] = []


TraceRecord = TraceHeader | Arrived | Scheduled | Resulted | Stopped | CacheReset | WorkerLost


class TraceWriter:
    """Appends records to a file. What is written is on its way to the disk after `flush` or `close`."""

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        """Begins a run. Raises ConfigError where the file cannot be written or holds something else."""
        self.path = pathlib.Path(path)
        self._encoder = msgspec.msgpack.Encoder()
        try:
            self._file = self.path.open("a+b", buffering=2**16)
            self._file.seek(0)
            begin = self._file.read(len(_MAGIC))
        except OSError as error:
            raise ConfigError(f"trace file {path} cannot be written: {error.strerror}") from error
        if begin and begin != _MAGIC:
            self._file.close()
            raise ConfigError(f"trace file {path} exists and is no trace; nothing is appended to it")
        if not begin:
            self._file.write(_MAGIC)
        self.write(header)
        self._file.flush()

    def write(self, record: TraceRecord) -> None:
        """Appends one record. Raises OSError where the disk takes no more."""
        payload = self._encoder.encode(record)
        self._file.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TraceReader:
    """The records of a file, in order; iterate once.

    `problem` tells afterwards why the reading ended before the file did; "" where it did not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ConfigError where the file cannot be read or is no trace."""
        self.problem = ""
        self._decoder = msgspec.msgpack.Decoder(TraceRecord)
        try:
            self._file = pathlib.Path(path).open("rb")  # noqa: SIM115 - closed when all is read
            begin = self._file.read(len(_MAGIC))
        except OSError as error:
            raise ConfigError(f"trace file {path} cannot be read: {error.strerror}") from error
        if begin != _MAGIC:
            self._file.close()
            raise ConfigError(f"{path} is no trace: its first bytes are {begin!r}, not {_MAGIC!r}")

    def __iter__(self) -> Iterator[TraceRecord]:
        with self._file:
            while (record := self._next()) is not None:
                yield record

    def _next(self) -> TraceRecord | None:
        offset = self._file.tell()
        begin = self._file.read(_LENGTH_BYTES)
        if not begin:
            return None
        length = int.from_bytes(begin, "little")
        payload = self._file.read(length) if length <= _MAX_RECORD_BYTES else b""
        if len(begin) < _LENGTH_BYTES or len(payload) < length:
            self.problem = f"the file ends within a record (at byte {offset})"
            return None
        try:
            record: TraceRecord = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            self.problem = f"the record at byte {offset} is damaged: {error}"
            return None
        if isinstance(record, TraceHeader) and record.version != TRACE_VERSION:
            self.problem = f"a run was recorded in version {record.version} of the format; {TRACE_VERSION} is known"
            return None
        return record


def read_run(reader: TraceReader, run: int | None = None) -> tuple[TraceHeader, list[TraceRecord]]:
    """One run of a file: the header and what follows it.

    Args:
        reader: a new one.
        run: 1 for the first; None takes the last.

    Raises:
        ConfigError: the file has no such run.
    """
    header: TraceHeader | None = None
    records: list[TraceRecord] = []
    num_runs = 0
    for record in reader:
        if isinstance(record, TraceHeader):
            num_runs += 1
            if run in (None, num_runs):
                header, records = record, []
        elif run in (None, num_runs):
            records.append(record)
    if header is None:
        raise ConfigError(f"the file has {num_runs} runs, no run {run}" if num_runs else reader.problem or "no run")
    return header, records
