"""The files of a batch run: what is read and written, and where an interrupted run goes on."""

import os
import pathlib
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from folovllm.common.errors import ConfigError

STANDARD = "-"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Open files.

    Attributes:
        source: descriptor of the input.
        sink: the output.
        done: custom ids that the output has an answer to already.
        num_lines: of the input; None where nobody knows.
    """

    source: int
    sink: BinaryIO
    done: frozenset[str]
    num_lines: int | None

    def start_anew(self) -> None:
        """Empties the output, if it is a file. Not done when it is opened: an engine that cannot start must not."""
        if stat.S_ISREG(os.fstat(self.sink.fileno()).st_mode):
            self.sink.truncate(0)


@contextmanager
def open_files(source: str, sink: str, *, resume: bool) -> Iterator[BatchFiles]:
    """Opens both; `-` is standard input or output.

    Args:
        source, sink: paths.
        resume: find out what the output holds already.

    Raises:
        ConfigError: one cannot be opened, or both are the same file.
    """
    with ExitStack() as stack:
        try:
            read = sys.stdin.buffer if source == STANDARD else stack.enter_context(pathlib.Path(source).open("rb"))
            if sink != STANDARD and os.path.exists(sink) and os.path.samestat(os.stat(sink), os.fstat(read.fileno())):
                raise ConfigError(f"{sink} is both input and output")
            done = _finished(pathlib.Path(sink)) if resume else frozenset[str]()
            written: Any = sys.stdout.buffer if sink == STANDARD else stack.enter_context(pathlib.Path(sink).open("ab"))
        except OSError as error:
            raise ConfigError(f"cannot open {error.filename or sink}: {error.strerror or error}") from error
        yield BatchFiles(read.fileno(), written, done, None if source == STANDARD else _num_lines(source))


class _Answered(msgspec.Struct):
    custom_id: Any = None


def _finished(sink: pathlib.Path) -> frozenset[str]:
    """The custom ids in an output. A last line that is not whole is cut off: its writer was interrupted."""
    if not sink.exists():
        return frozenset()
    done, size = set(), 0
    with sink.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(size)
                break
            size += len(line)
            try:
                custom_id = msgspec.json.decode(line, type=_Answered).custom_id
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{sink} is no output of a batch: {error}") from error
            if isinstance(custom_id, str):
                done.add(custom_id)
    return frozenset(done)


def _num_lines(source: str) -> int | None:
    """Ends of lines; only of a regular file, which can be read twice."""
    path = pathlib.Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
