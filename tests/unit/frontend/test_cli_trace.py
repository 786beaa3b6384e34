"""`folovllm trace`: output, notes, exit codes."""

import pathlib

import msgspec
import pytest
from click.testing import CliRunner

from folovllm.common.trace_file import TraceWriter
from folovllm.frontend.cli.main import cli, run
from tests.fakes.traced_engine import HEADER, TracedEngine


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two runs: one of 450 steps, one of 3."""
    path = tmp_path / "run.trace"
    for max_tokens in (450, 3):
        engine = TracedEngine(num_blocks=200, max_model_len=1000, depth=2)
        engine.add(5, max_tokens=max_tokens)
        engine.run()
        writer = TraceWriter(path, msgspec.structs.replace(HEADER, num_blocks=200, max_model_len=1000))
        for record in engine.records:
            writer.write(record)
        writer.close()
    return path


def test_show_draws_the_last_run(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "show", str(file), "--width", "50"]) == 0
    captured = capsys.readouterr()
    assert "1 requests, 3 steps" in captured.out
    assert "a r0 █──" in captured.out
    assert captured.err == ""


def test_show_says_that_there_is_more(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "show", str(file), "--run", "1"]) == 0
    captured = capsys.readouterr()
    assert "steps 0 to " in captured.out
    assert "blocks after step 399:" in captured.out
    assert captured.err == "Note: the first 400 of 450 steps; --steps A:B shows others\n"


@pytest.mark.parametrize(
    ("steps", "shown"),
    [("2:4", "steps 2 to 3,"), ("448:", "steps 448 to 449,"), (":1", "steps 0 to 0,"), ("7", "steps 7 to 7,")],
)
def test_steps_are_chosen(file: pathlib.Path, capsys: pytest.CaptureFixture[str], steps: str, shown: str) -> None:
    assert run(["trace", "show", str(file), "--run", "1", "--steps", steps]) == 0
    captured = capsys.readouterr()
    assert shown in captured.out
    assert captured.err == ""


def test_requests_are_chosen(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "show", str(file), "--request", "r0", "--request", "7"]) == 0
    assert "a r0" in capsys.readouterr().out
    assert run(["trace", "show", str(file), "--request", "7"]) == 0
    assert "nothing to show" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["x", "1-2", "1:x", "-1:3", ""])
def test_what_is_no_range_is_refused(file: pathlib.Path, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert run(["trace", "show", str(file), f"--steps={steps}"]) == 2
    assert "is no range of steps; write A:B" in capsys.readouterr().err


def test_a_table_instead(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "show", str(file), "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].endswith("events")
    assert lines[-3].endswith("r0 got a slot")
    assert len(lines) == 7


def test_a_picture_instead(file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "show", str(file), "--png", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""


def test_a_cut_file_is_shown_up_to_the_cut(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    assert run(["trace", "show", str(file)]) == 0
    captured = capsys.readouterr()
    assert "a r0 █──" in captured.out
    assert "Note: the file ends within a record" in captured.err


@pytest.mark.parametrize("command", ["show", "replay"])
def test_what_is_no_trace_is_refused(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "notes").write_text("not a trace")
    assert run(["trace", command, str(tmp_path / "notes")]) == 2
    assert run(["trace", command, str(tmp_path / "gone")]) == 2
    err = capfd.readouterr().err
    assert "is no trace" in err
    assert "cannot be read: No such file" in err


def test_replay_tells_whether_the_decisions_are_the_same(file: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "replay", str(file), "--run", "1"]) == 0
    assert capfd.readouterr().out == "450 steps of 1 requests made again: the same decisions\n"
    writer = TraceWriter(file, HEADER)  # a run with another pool, whose records are the other one's
    engine = TracedEngine(num_blocks=9)
    engine.add(5, max_tokens=3)
    engine.run()
    for record in engine.records:
        writer.write(record)
    writer.close()
    assert run(["trace", "replay", str(file)]) == 1
    assert "came out differently" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["show", "replay"])
def test_help_pages_have_examples(command: str) -> None:
    output = CliRunner().invoke(cli, ["trace", command, "--help"]).output
    assert "Examples:" in output
    assert "--run" in output
