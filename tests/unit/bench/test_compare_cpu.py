"""The comparison's own part: who can be opened, what is shown of the command. Engines are made up."""

import argparse
import json
import os
import pathlib
import signal
import sys
from typing import Any, ClassVar

import pytest

from bench import compare_cpu
from bench.peers.catalog import KINDS
from bench.peers.peer import Answer, PeerError
from bench.peers.work import QUICK, WORKS


class FakeProcess:
    """Stands for `PeerProcess`: what it does is told by the command, which is the engine's name here."""

    made: ClassVar[list["FakeProcess"]] = []

    def __init__(self, command: str, environment: dict[str, str] | None, log: pathlib.Path) -> None:
        self.name = command
        self.environment = environment
        self.started_at = 0.0
        self.asked: list[tuple[int, int, int]] = []
        self.is_stopped = False
        FakeProcess.made.append(self)

    def wait_ready(self, timeout_s: float) -> str:
        if self.name == "transformers":
            raise PeerError("ImportError: no torch")
        return f"{self.name} 1"

    def ask(self, prompts: list[list[int]], num_tokens: int, timeout_s: float) -> Answer:
        self.asked.append((len(prompts), len(prompts[0]), num_tokens))
        return Answer(1.0, 0.5, prompts, [[1] * num_tokens for _ in prompts])

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[FakeProcess]:
    """Processes made so far; every engine but vLLM is installed."""
    names = {kind.title: name for name, kind in KINDS.items()}
    monkeypatch.setattr(FakeProcess, "made", [])
    monkeypatch.setattr(compare_cpu, "PeerProcess", FakeProcess)
    monkeypatch.setattr(compare_cpu, "is_installed", lambda kind, python: kind.package != "vllm")
    monkeypatch.setattr(compare_cpu, "command_for", lambda kind, *_: names[kind.title])
    monkeypatch.setattr(compare_cpu, "cache_dir", lambda: tmp_path)
    return FakeProcess.made


def given(*arguments: str) -> argparse.Namespace:
    return compare_cpu.options().parse_args(list(arguments))


def test_engines_that_cannot_be_opened_are_named_and_the_others_go_on(made: list[FakeProcess]) -> None:
    arguments = given("--engines", "own", "transformers", "vllm", "--warm-up-s", "0")
    opening = compare_cpu.Opening(arguments, pathlib.Path("model"), QUICK)
    with opening.opened() as peers:
        assert list(peers) == ["own"]
        assert not made[0].is_stopped
    assert opening.not_run == {
        "transformers": "ImportError: no torch",
        "vllm": "its interpreter has no package vllm",
    }
    assert opening.versions == {"own": "own 1"}
    assert [process.is_stopped for process in made] == [True, True]


def test_engines_without_a_four_bit_form_are_named(made: list[FakeProcess]) -> None:
    words = ["--engines", "llama_cpp", "transformers", "--bits", "4", "--form", "llama_cpp=x.gguf", "--warm-up-s", "0"]
    opening = compare_cpu.Opening(given(*words), pathlib.Path("model"), QUICK)
    with opening.opened() as peers:
        assert list(peers) == ["llama_cpp"]
    assert opening.not_run == {"transformers": "it has no 4-bit form here"}


def test_only_our_own_processes_get_our_settings(made: list[FakeProcess]) -> None:
    arguments = given("--engines", "own", "llama_cpp", "--warm-up-s", "0", "--form", "llama_cpp=x.gguf")
    with compare_cpu.Opening(arguments, pathlib.Path("model"), QUICK).opened():
        pass
    assert [process.environment is None for process in made] == [False, True]


def test_every_work_is_warmed_up_with_few_tokens(made: list[FakeProcess]) -> None:
    arguments = given("--engines", "own", "--warm-up-s", "0")
    with compare_cpu.Opening(arguments, pathlib.Path("model"), WORKS).opened():
        pass
    assert made[0].asked == [(1, 8, 1), (1, 128, 4), (16, 128, 4), (64, 128, 4), (1, 1024, 1), (1, 1024, 4)]


def test_paths_are_given_by_name_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--python",
        "vllm=/somewhere/bin/python",
        "--form",
        "llama_cpp=/elsewhere/model.gguf",
        "--engines",
        "own",
        "vllm",
    ]
    monkeypatch.setattr(sys, "argv", ["compare_cpu.py", *words])
    arguments = given(*words)
    assert arguments.python == {"vllm": "/somewhere/bin/python"}
    assert arguments.form == {"llama_cpp": "/elsewhere/model.gguf"}
    shown = compare_cpu.shown_command(arguments)
    assert shown == "python -m bench.compare_cpu --python vllm=PATH --form llama_cpp=PATH --engines own vllm"
    assert given().python == {}


@pytest.mark.parametrize("word", ["vllm", "vllm=", "nobody=/x"])
def test_a_path_for_nobody_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--python", word)
    assert f"'{word}' is not NAME=PATH with NAME one of own, bare, transformers" in capsys.readouterr().err


def test_sigterm_ends_it_through_its_blocks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        compare_cpu.end_in_order()
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
        assert end.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_limits_are_measured_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = "a warning\n" + json.dumps({"read_memory_gb_per_s": 20.0})

    seen: dict[str, Any] = {}

    def run(command: list[str], **how: Any) -> Done:
        seen.update(how, command=command)
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    assert compare_cpu.measure_limits(pathlib.Path("model"), 2) == {"read_memory_gb_per_s": 20.0}
    assert seen["command"][1:] == ["-m", "bench.peers.limits", "model", "--threads", "2"]
    assert "GLIBC_TUNABLES" in seen["env"]
