"""Traces as files: what was written is read, whatever was appended, cut or damaged."""

import pathlib

import msgspec
import pytest

from folovllm.common.errors import ConfigError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.trace_file import (
    TRACE_VERSION,
    Admitted,
    Arrived,
    CacheReset,
    Ended,
    Resulted,
    Scheduled,
    Stopped,
    TraceHeader,
    TraceReader,
    TraceRecord,
    TraceWriter,
    WorkerLost,
    read_run,
)

HEADER = TraceHeader(TRACE_VERSION, "0", "m", 1.5, 4, 10, 2, 16, 64, "fcfs", True, None, 3, 0.25, 2)
RECORDS: list[TraceRecord] = [
    Arrived(1.0, 0, "a", 0, 7, b"\1\0\0\0", SamplingRow(temperature=0.5, stop_token_ids=b"\2\0\0\0"), 9, stream=True),
    Arrived(1.0, 1, "a", 0, 8, b"", SamplingRow(sample_index=1), 9, parent=0, sample_index=1),
    Scheduled(1.25, 0, b"\0\0\0\0", b"", 9, admitted=[Admitted(0, 0, 1, 0, b"\1\0\0\0")]),
    Resulted(1.5, 0, b"\5\0\0\0", 9, ended=[Ended(0, "stop", 1)]),
    Scheduled(1.75, 1, None, b"", 9, b"\0\0\0\0", b"\2\0\0\0", b"\1\0\0\0\2\0\0\0", preempted=[1]),
    Stopped(2.0, [Ended(1, "timeout", 0)], 10),
    CacheReset(2.5),
    WorkerLost(2.75, [1], [1]),
]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file with one run."""
    path = tmp_path / "trace"
    write_run(path)
    return path


def write_run(path: pathlib.Path, header: TraceHeader = HEADER, records: list[TraceRecord] = RECORDS) -> None:
    writer = TraceWriter(path, header)
    for record in records:
        writer.write(record)
    writer.close()


def test_what_was_written_is_read(path: pathlib.Path) -> None:
    reader = TraceReader(path)
    assert list(reader) == [HEADER, *RECORDS]
    assert reader.problem == ""
    assert len(path.read_bytes()) < 600


def test_a_second_run_is_appended_and_each_can_be_read(path: pathlib.Path) -> None:
    second = msgspec.structs.replace(HEADER, started_at=9.0)
    write_run(path, second, RECORDS[:2])
    assert read_run(TraceReader(path)) == (second, RECORDS[:2])
    assert read_run(TraceReader(path), 1) == (HEADER, RECORDS)
    assert read_run(TraceReader(path), 2) == (second, RECORDS[:2])
    for run in (0, 3):
        with pytest.raises(ConfigError, match=f"has 2 runs, no run {run}"):
            read_run(TraceReader(path), run)


def test_a_file_cut_anywhere_gives_what_is_whole(path: pathlib.Path) -> None:
    whole = path.read_bytes()
    num_read = set()
    for size in range(8, len(whole)):
        path.write_bytes(whole[:size])
        reader = TraceReader(path)
        records = list(reader)
        assert records == [HEADER, *RECORDS][: len(records)]
        num_read.add(len(records))
        end = sum(len(msgspec.msgpack.encode(record)) + 4 for record in records) + 8
        assert reader.problem == ("" if end == size else f"the file ends within a record (at byte {end})")
    assert num_read == set(range(len(RECORDS) + 1))


def test_damage_ends_the_reading_and_is_told(path: pathlib.Path) -> None:
    whole = path.read_bytes()
    for position in range(8, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        reader = TraceReader(path)
        assert len(list(reader)) <= len(RECORDS) + 1  # some damage gives another valid number; none raises
    path.write_bytes(whole[:8] + b"\xff\xff\xff\xff" + whole)
    reader = TraceReader(path)
    assert list(reader) == []
    assert "ends within a record (at byte 8)" in reader.problem


def test_another_version_is_named(path: pathlib.Path) -> None:
    write_run(path, msgspec.structs.replace(HEADER, version=99))
    reader = TraceReader(path)
    assert list(reader) == [HEADER, *RECORDS]
    assert "version 99 of the format; 1 is known" in reader.problem


@pytest.mark.parametrize("content", [b"", b"FOLO", b"a text\nof another kind"])
def test_what_is_no_trace_is_refused_by_the_reader(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no trace"):
        TraceReader(path)


def test_a_file_without_a_run_is_refused(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:12])
    with pytest.raises(ConfigError, match="within a record"):
        read_run(TraceReader(path))
    path.write_bytes(path.read_bytes()[:8])
    with pytest.raises(ConfigError, match="no run"):
        read_run(TraceReader(path))


def test_nothing_is_appended_to_something_else(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, worth keeping")
    with pytest.raises(ConfigError, match="exists and is no trace"):
        TraceWriter(path, HEADER)
    assert path.read_text() == "my notes, worth keeping"


def test_files_that_cannot_be_opened_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="gone/trace cannot be written: No such file"):
        TraceWriter(tmp_path / "gone" / "trace", HEADER)
    with pytest.raises(ConfigError, match="gone cannot be read: No such file"):
        TraceReader(tmp_path / "gone")


def test_what_is_flushed_can_be_read_while_the_writer_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace"
    writer = TraceWriter(path, HEADER)
    assert list(TraceReader(path)) == [HEADER]
    writer.write(RECORDS[0])
    writer.flush()
    assert list(TraceReader(path)) == [HEADER, RECORDS[0]]
    writer.close()
