"""The files of a batch run: opened, kept, emptied, gone on with."""

import json
import os
import pathlib
import sys

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.server.batch_files import open_files


@pytest.fixture
def paths(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    source = tmp_path / "in.jsonl"
    source.write_text("one\n\ntwo\n")
    return source, tmp_path / "out.jsonl"


def test_two_files(paths: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, sink = paths
    with open_files(str(source), str(sink), resume=False) as files:
        assert os.read(files.source, 100) == b"one\n\ntwo\n"
        assert (files.num_lines, files.done) == (3, frozenset())
        files.sink.write(b"x\n")
    assert sink.read_bytes() == b"x\n"


def test_an_old_output_is_emptied_at_the_start_and_not_before(paths: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, sink = paths
    sink.write_text("old\n")
    with open_files(str(source), str(sink), resume=False) as files:
        assert sink.read_text() == "old\n", "the engine may yet fail to start"
        files.start_anew()
        files.sink.write(b"new\n")
    assert sink.read_text() == "new\n"


def test_an_interrupted_run_goes_on(paths: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, sink = paths
    whole = "".join(json.dumps({"id": str(i), "custom_id": f"c{i}"}) + "\n" for i in range(3))
    sink.write_text(whole + json.dumps({"custom_id": None}) + "\n" + '{"custom_id": "c9", "resp')
    with open_files(str(source), str(sink), resume=True) as files:
        assert files.done == {"c0", "c1", "c2"}
        files.sink.write(b"more\n")
    assert sink.read_text() == whole + '{"custom_id": null}\nmore\n'


def test_nothing_to_go_on_with(paths: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, sink = paths
    with open_files(str(source), str(sink), resume=True) as files:
        assert files.done == frozenset()
    sink.write_text("hello\n")
    with pytest.raises(ConfigError, match="is no output of a batch"), open_files(str(source), str(sink), resume=True):
        pass
    assert sink.read_text() == "hello\n"


@pytest.mark.parametrize("resume", [False, True])
def test_files_that_cannot_be_used(paths: tuple[pathlib.Path, pathlib.Path], resume: bool) -> None:
    source, sink = paths
    for wrong, names in (
        ((str(source.with_name("none")), str(sink)), "none: No such file"),
        ((str(source), str(sink.parent / "no" / "out")), "out: No such file"),
        ((str(source), str(source)), "is both input and output"),
        ((str(source.parent), str(sink)), "directory"),
    ):
        with pytest.raises(ConfigError, match=names), open_files(*wrong, resume=resume):
            pass
    assert source.read_text() == "one\n\ntwo\n"


def test_standard_input_and_output(
    monkeypatch: pytest.MonkeyPatch, paths: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    source, _ = paths
    with source.open() as given, (tmp_path / "stdout").open("w") as out:
        monkeypatch.setattr(sys, "stdin", given)
        monkeypatch.setattr(sys, "stdout", out)
        with open_files("-", "-", resume=False) as files:
            assert files.num_lines is None and os.read(files.source, 3) == b"one"
            files.sink.write(b"x\n")
            files.sink.flush()
        assert (tmp_path / "stdout").read_bytes() == b"x\n"
        monkeypatch.undo()
