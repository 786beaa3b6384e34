"""Lines of files and pipes: wherever they are cut, however long they are."""

import asyncio
import os
import pathlib
from collections.abc import Awaitable, Callable

import pytest

from folovllm.frontend.server import batch_lines
from folovllm.frontend.server.batch_lines import Line, LineReader


def all_of(fd: int, max_bytes: int = 20) -> list[Line]:
    async def read() -> list[Line]:
        reader = LineReader(fd, max_bytes)
        lines = []
        while (line := await reader.next()) is not None:
            lines.append(line)
        assert await reader.next() is None, "it stays at the end"
        return lines

    return asyncio.run(asyncio.wait_for(read(), 60))


def of_file(tmp_path: pathlib.Path, data: bytes, max_bytes: int = 20) -> list[Line]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    with path.open("rb") as file:
        return all_of(file.fileno(), max_bytes)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_lines_of_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(batch_lines, "_PIECE", piece)
    data = b"first\n\n  \nsecond\r\n" + b"x" * 21 + b"\n" + b"y" * 20 + b"\nlast"
    assert of_file(tmp_path, data) == [
        Line(1, b"first"),
        Line(4, b"second\r"),
        Line(5, None),
        Line(6, b"y" * 20),
        Line(7, b"last"),
    ]


@pytest.mark.parametrize("piece", [1, 8, 1000])
def test_a_last_line_that_is_too_long(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(batch_lines, "_PIECE", piece)
    assert of_file(tmp_path, b"a\n" + b"x" * 500) == [Line(1, b"a"), Line(2, None)]


def test_nothing(tmp_path: pathlib.Path) -> None:
    assert of_file(tmp_path, b"") == of_file(tmp_path, b"\n\n") == []
    with open(os.devnull, "rb") as null:
        assert all_of(null.fileno()) == []


def test_a_very_long_line_is_not_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    take = LineReader._take

    def note(self: LineReader, piece: bytes) -> None:
        take(self, piece)
        sizes.append(len(self._rest))

    monkeypatch.setattr(LineReader, "_take", note)
    assert of_file(tmp_path, b"x" * 3_000_000 + b"\nok\n", max_bytes=100) == [Line(1, None), Line(2, b"ok")]
    assert max(sizes) <= 100 + 65_536


def with_pipe(scenario: Callable[[LineReader, int], Awaitable[None]]) -> None:
    async def run() -> None:
        read, write = os.pipe()
        try:
            await asyncio.wait_for(scenario(LineReader(read, 100), write), 60)
        finally:
            os.close(read)

    asyncio.run(run())


def test_a_pipe_is_waited_for() -> None:
    async def scenario(reader: LineReader, write: int) -> None:
        waiting = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        os.write(write, b"half a ")
        os.write(write, b"line\nmore")
        assert await waiting == Line(1, b"half a line")
        os.close(write)
        assert await reader.next() == Line(2, b"more")
        assert await reader.next() is None

    with_pipe(scenario)


def test_several_tasks_take_turns() -> None:
    async def scenario(reader: LineReader, write: int) -> None:
        tasks = [asyncio.ensure_future(reader.next()) for _ in range(4)]
        os.write(write, b"a\nb\nc\n")
        os.close(write)
        lines = await asyncio.gather(*tasks)
        assert sorted(line.data or b"" for line in lines if line) == [b"a", b"b", b"c"]
        assert lines.count(None) == 1

    with_pipe(scenario)


def test_waiting_can_be_cancelled() -> None:
    async def scenario(reader: LineReader, write: int) -> None:
        waiting = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        os.write(write, b"a\n")
        os.close(write)
        assert await reader.next() == Line(1, b"a")

    with_pipe(scenario)
