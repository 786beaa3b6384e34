"""The command line through all three processes, on a tiny model."""

import json
import os
import pathlib
import pty
import subprocess
import sys

from tests.integration.conftest import ROOT, TINY, Daemon

_TIMEOUT_S = 100.0


def folovllm(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "folovllm", *args],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def test_generate_with_an_engine_of_its_own(tiny_folder: pathlib.Path) -> None:
    done = folovllm(
        *("generate", "abc", "--model", str(tiny_folder), *TINY, "--max-tokens", "4", "--temperature", "0"),
        *("--json", "--verbose", "--ignore-eos"),
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["outputs"][0]["token_ids"]) == 4
    assert "load weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_start_is_one_line(tiny_folder: pathlib.Path) -> None:
    done = folovllm("generate", "abc", "--model", str(tiny_folder))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ModelError in worker-0: ")
    assert done.stdout == ""


def test_chat_quick_with_a_daemon(daemon: Daemon) -> None:
    args = ("chat", "--engine", daemon.endpoint, "--quick", "hi", "--max-tokens", "8", "--temperature", "0")
    done, again = folovllm(*args), folovllm(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout == again.stdout


def test_chat_in_a_terminal(daemon: Daemon) -> None:
    """Typed into a pseudo terminal: a question, /stats, /exit."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "folovllm", "chat", "--engine", daemon.endpoint, "--no-table"]
    command += ["--max-tokens", "5", "--ignore-eos"]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        _read_until(ours, "you> ")
        os.write(ours, b"hello\n")
        _read_until(ours, "you> ")
        os.write(ours, b"/stats\n")
        shown = _read_until(ours, "you> ")
        os.write(ours, b"/exit\n")
        assert process.wait(60) == 0
    os.close(ours)
    assert "last answer: 5 tokens" in shown
    assert "KV blocks in use" in shown


def _read_until(descriptor: int, text: str) -> str:
    seen = ""
    while text not in seen:
        seen += os.read(descriptor, 4096).decode(errors="replace")
    return seen
