"""`folovllm completion`: the scripts, and what they are answered."""

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from folovllm.frontend.cli.main import cli, run
from folovllm.frontend.cli.options import complete_model
from tests.sources import ROOT


def offered(args: list[str], incomplete: str) -> list[str]:
    """What is offered for an unfinished word; folders and files as their kind in brackets."""
    items = ShellComplete(cli, {}, "folovllm", "_FOLOVLLM_COMPLETE").get_completions(args, incomplete)
    return [str(item.value) if item.type == "plain" else f"<{item.type}>" for item in items]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert f"_FOLOVLLM_COMPLETE={shell}_complete" in out and "folovllm" in out and err == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    run(["completion", "bash"])
    script = capsys.readouterr().out + "\ncomplete -p folovllm"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "_folovllm_completion folovllm" in done.stdout


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, incomplete, offers",
    [
        ([], "ch", ["chat"]),
        ([], "run", ["run-batch"]),
        (["bench"], "", ["latency", "serve", "throughput"]),
        (["chat"], "--ap", ["--api-key"]),
        (["chat"], "de", ["<dir>", "demo"]),
        (["serve"], "x", ["<dir>"]),
        (["engine"], "d", ["<dir>", "demo"]),
        (["generate", "--model"], "d", ["<dir>", "demo"]),
        (["run-batch", "-i"], "x", ["<file>"]),
        (["bench", "serve", "--backend"], "", ["completions", "chat"]),
        (["completion"], "", ["bash", "zsh", "fish"]),
    ],
)
def test_what_is_offered(args: list[str], incomplete: str, offers: list[str]) -> None:
    assert offered(args, incomplete) == offers


def test_every_model_is_completed() -> None:
    for name, command in cli.commands.items():
        for parameter in command.params:
            if parameter.name == "model":
                assert parameter._custom_shell_complete is not None, name


def test_the_program_answers_the_shell() -> None:
    environment = dict(os.environ) | {
        "_FOLOVLLM_COMPLETE": "bash_complete",
        "COMP_WORDS": "folovllm ch",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-m", "folovllm"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "plain,chat\n"


def test_models_are_folders_and_the_demo() -> None:
    context = click.Context(cli)
    assert [item.value for item in complete_model(context, cli.commands["chat"].params[0], "./x")] == ["./x"]
