"""`folovllm run-batch`: options, files, what it tells, exit codes."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from folovllm.frontend.cli.main import run
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.sources import ROOT
from tests.unit.frontend.conftest import Run


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "in.jsonl"
    request = {"method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "abc", "max_tokens": 2}}
    lines = [json.dumps({"custom_id": str(i), **request}) for i in range(4)]
    wrong = json.dumps({"custom_id": "w", **request, "body": {"prompt": ""}})
    path.write_text("\n".join([*lines, wrong, "nonsense"]) + "\n")
    return path


def texts(path: pathlib.Path) -> dict[str, str]:
    outputs = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        output["custom_id"]: output["response"]["body"]["choices"][0]["text"]
        for output in outputs
        if output["response"] and output["response"]["status_code"] == 200
    }


def test_a_file(folo: Run, source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sink = tmp_path / "out.jsonl"
    sink.write_text("old\n")
    args = ("run-batch", "-i", str(source), "-o", str(sink), "--served-model-name", "m")
    code, out, err = folo(*args)
    assert (code, out) == (0, "")
    assert "6/6" in err and err.splitlines()[-1] == "4 answered, 1 refused or failed, 1 lines without a request"
    assert texts(sink) == dict.fromkeys("0123", "cb")
    assert len(sink.read_text().splitlines()) == 6


def test_going_on(folo: Run, core: FakeCore, source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sink = tmp_path / "out.jsonl"
    args = ("run-batch", "-i", str(source), "-o", str(sink), "--served-model-name", "m", "--disable-tqdm")
    assert folo(*args)[0] == 0
    kept = sink.read_text().splitlines()[:3]
    sink.write_text("\n".join(kept) + '\n{"custom_id": "3", "re')
    _, _, err = folo(*args, "--resume")
    assert "passed over" in err
    assert texts(sink) == dict.fromkeys("0123", "cb")
    assert sink.read_text().splitlines()[:3] == kept


@pytest.mark.parametrize(
    "args, message",
    [
        (["--resume", "-o", "-"], "--resume reads what the output file holds"),
        (["-o", "/no/such/folder/out"], "cannot open /no/such/folder/out"),
        (["-o", "x", "--max-in-work", "0"], "0 is not in the range"),
        (["-o", "/dev/null", "--max-body-mb", "0"], "max_body_mb=0.0"),
        (["-o", "/dev/null", "--tool-parser", "none-such"], "none-such"),
        (["-o", "/dev/null", "--model", "demo"], "give either --model MODEL"),
    ],
)
def test_wrong_input(folo: Run, source: pathlib.Path, args: list[str], message: str) -> None:
    code, out, err = folo("run-batch", "-i", str(source), *args)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_a_failing_engine_is_exit_code_1_and_keeps_what_it_wrote(
    folo: Run, core: FakeCore, source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    sink = tmp_path / "out.jsonl"

    def end_at_the_third(_: object) -> None:
        if len(core.requests) == 3:
            core.fail("the worker is gone")

    core.reject = end_at_the_third
    args = ("--served-model-name", "m", "--max-in-work", "1", "--disable-tqdm")
    code, _, err = folo("run-batch", "-i", str(source), "-o", str(sink), *args)
    assert code == 1 and "the worker is gone" in err
    assert list(texts(sink)) == ["0", "1"]


def test_neither_model_nor_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run-batch", "-i", "a", "-o", "b"]) == 2
    assert "give either --model MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_while_it_waits_for_lines(
    core: FakeCore, source: pathlib.Path, number: int, code: int
) -> None:
    """A pipe for standard input that stays open: the first answer is out, the next line never comes."""
    command = [sys.executable, "-m", "folovllm", "run-batch", "-i", "-", "-o", "-", "--engine", core.endpoint]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(source.read_text().splitlines()[0].replace('"model": "m", ', "") + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == "0"
        process.send_signal(number)
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
