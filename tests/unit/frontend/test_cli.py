"""The command line against a fake core: output, exit codes, help pages, and what it imports for them."""

import json
import pathlib
import re
import signal
import struct
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

from folovllm.common.config import EngineConfig
from folovllm.common.messages.frontend_core import Grammar
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.cli.main import cli, run
from folovllm.frontend.cli.options import ENGINE_OPTIONS, SAMPLING_OPTIONS
from folovllm.frontend.engine_options import EngineOptions
from folovllm.frontend.llm import LLM
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import ids_of, write_model_folder
from tests.unit.frontend.conftest import Run

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_generate_prints_prompt_and_answer(folo: Run) -> None:
    assert folo("generate", "abc", "xy", "--max-tokens", "4") == (0, "abccbac\nxyyxyx\n", "")


def test_generate_reads_prompts_from_standard_input(folo: Run) -> None:
    assert folo("generate", "-", "--max-tokens", "1", stdin="ab\ncd\n") == (0, "abb\ncdd\n", "")


def test_generate_writes_json(folo: Run) -> None:
    code, out, _ = folo("generate", "abc", "-n", "2", "--json", "--max-tokens", "2")
    assert code == 0
    answers = json.loads(out)["outputs"]
    assert [answer["text"] for answer in answers] == ["cb", "ba"]
    assert answers[0] == {"text": "cb", "token_ids": [99, 98], "finish_reason": "length", "stop_reason": None}


def test_generate_shows_table_and_bar_if_asked(folo: Run) -> None:
    code, out, err = folo("generate", "abc", "--verbose", "--max-tokens", "1")
    assert (code, out) == (0, "abcc\n")
    assert "load tokenizer" in err
    assert "1/1" in err


def test_every_sampling_parameter_arrives(folo: Run, core: FakeCore) -> None:
    code, _, _ = folo(
        *("generate", "abc", "--max-tokens", "5", "--min-tokens", "1", "--temperature", "0.5", "--top-k", "3"),
        *("--top-p", "0.5", "--min-p", "0.25", "--sampling-seed", "9", "--stop", "zz", "--stop-token-id", "7"),
        *("--ignore-eos", "-n", "2"),
    )
    (request,) = core.requests
    row = request.sampling
    assert code == 0
    assert (request.max_tokens, request.n, request.stream) == (5, 2, True)
    assert (row.min_tokens, row.temperature, row.top_k, row.top_p, row.min_p, row.seed) == (1, 0.5, 3, 0.5, 0.25, 9)
    assert row.stop_token_ids == b"\x07\x00\x00\x00"


def test_penalties_lists_and_bounds_arrive(folo: Run, core: FakeCore) -> None:
    code, _, _ = folo(
        *("generate", "abcdef", "--presence-penalty", "1", "--frequency-penalty", "-1", "--repetition-penalty", "1.5"),
        *("--bad-word", "x", "--bad-word", "yz", "--allowed-token-id", "99", "--allowed-token-id", "98"),
        *("--logit-bias", "99=1.5", "--logit-bias", "7=-100", "--timeout-s", "2.5", "--truncate-prompt-tokens", "3"),
    )
    (request,) = core.requests
    row = request.sampling
    assert code == 0
    assert (row.presence_penalty, row.frequency_penalty, row.repetition_penalty) == (1.0, -1.0, 1.5)
    assert row.bad_words == [int32.pack(ids_of(word)) for word in ("x", "yz")]
    assert int32.unpack(row.allowed_token_ids) == [99, 98]
    assert (int32.unpack(row.bias_token_ids), row.bias_values) == ([99, 7], struct.pack("<2f", 1.5, -100))
    assert (request.timeout_s, int32.unpack(request.prompt_token_ids)) == (2.5, ids_of("def"))


def test_structured_outputs_arrive(folo: Run, core: FakeCore, tmp_path: pathlib.Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    for args in (
        ["--json-schema", str(tmp_path / "schema.json")],
        ["--regex", "a+"],
        ["--choice", "a", "--choice", "b"],
    ):
        assert folo("generate", "abc", *args)[0] == 0
    assert [request.grammar for request in core.requests] == [
        Grammar("json", '{"type": "object"}'),
        Grammar("regex", "a+"),
        Grammar("choice", '["a", "b"]'),
    ]


def test_log_probabilities_are_part_of_the_json(folo: Run) -> None:
    args = ("generate", "abc", "--json", "--logprobs", "1", "--prompt-logprobs", "0", "--max-tokens", "1")
    code, out, _ = folo(*args)
    shown = json.loads(out)
    assert code == 0
    assert shown["prompt_logprobs"][0] is None
    assert [[entry["token"] for entry in place] for place in shown["prompt_logprobs"][1:]] == [["b"], ["c"]]
    (place,) = shown["outputs"][0]["logprobs"]
    assert [(entry["token_id"], entry["token"], entry["rank"]) for entry in place] == [(99, "c", 2), (100, "d", 1)]
    assert place[0]["logprob"] == shown["outputs"][0]["cumulative_logprob"] == pytest.approx(-0.099)


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["generate", "abc", "--logprobs", "1"], 2, "give --json too"),
        (["generate", "abc", "--logit-bias", "5"], 2, "'5' is no ID=VALUE, as 42=-1.5"),
        (["generate", "abc", "--logit-bias", "x=5"], 2, "'x=5' is no ID=VALUE"),
        (["generate", "abc", "--regex", "a", "--choice", "b"], 2, "it has regex and choice"),
        (["generate", "abc", "--json-schema", "/no/such/file"], 2, "No such file"),
        (["generate", "abc", "--presence-penalty", "3"], 2, "presence_penalty=3.0 must be a finite number between"),
        (["generate", "abc", "--temperature", "-1"], 2, "Error: temperature=-1.0 must be a finite number between"),
        (["generate", "x" * 70], 2, "Error: prompts[0]: the prompt has 70 tokens"),
        (["generate", "abc", "--block-size", "8"], 2, "Error: block_size cannot be given with engine="),
        (["generate", "abc", "--blocksize", "8"], 2, "No such option"),
        (["generate"], 2, "Missing argument"),
        (["generate", "abc", "--dtype", "int3"], 2, "is not one of 'auto', 'bfloat16'"),
        (["chat", "--quick", "a", "--ask", "b"], 2, "does not go with --ask"),
        (["chat", "/no/such/model"], 2, "Error: model '/no/such/model' is not known"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folo: Run, args: list[str], code: int, message: str) -> None:
    got, out, err = folo(*args)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_failing_engine_is_exit_code_1(folo: Run, core: FakeCore, capsys: pytest.CaptureFixture[str]) -> None:
    core.fail_with = lambda request: "out of paper"
    code, _, err = folo("generate", "abc")
    assert (code, err) == (1, "Error: request 0 failed: out of paper\n")
    assert run(["chat"]) == 2
    assert "give a MODEL" in capsys.readouterr().err


def test_a_fault_of_the_program_shows_its_traceback(folo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LLM, *args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LLM, "generate", broken)
    with pytest.raises(ZeroDivisionError):
        folo("generate", "abc")


def test_ctrl_c_is_exit_code_130(folo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LLM, *args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert folo("generate", "abc")[0] == 130


def test_the_engines_options_are_all_there() -> None:
    names = [name for name, _, _ in ENGINE_OPTIONS]
    assert names == list(EngineOptions.__annotations__)
    fields = set(EngineConfig.__struct_fields__) - {"model", "num_valid_token_ids"}
    assert fields == set(names)
    assert {name for name, _, _ in SAMPLING_OPTIONS} <= set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_pages_are_whole(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert all(len(line) <= 110 for line in result.output.splitlines())
    options = [option for option in cli.commands[command].params if isinstance(option, click.Option)]
    assert all(option.help and option.opts[-1] in result.output for option in options)
    if "Engine:" in result.output:
        assert result.output.index("Engine:") < result.output.index("Examples:")


def test_the_first_help_page_names_the_commands() -> None:
    output = CliRunner().invoke(cli, ["--help"]).output
    assert [name for name in ("generate", "chat", "engine", "env") if name not in output] == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from folovllm.frontend.cli.main import run; run(['--help']); "
        "print([name for name in ('msgspec', 'zmq', 'torch', 'numpy', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_env_reports_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"].startswith(sys.version.split()[0])
    assert re.match(r"\d+\.\d+", lines["torch"])
    assert "GiB" in lines["memory"]
    assert set(lines) >= {"folovllm", "system", "processor", "pyzmq", "devices"}


def test_env_never_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr("platform.platform", broken)
    monkeypatch.setattr("os.sysconf", broken)
    monkeypatch.setattr("importlib.metadata.version", broken)
    assert run(["env"]) == 0
    out = capsys.readouterr().out
    assert "memory           unknown (OSError: no such thing)" in out
    assert "torch            unknown (OSError: no such thing)" in out


def test_sigterm_ends_a_command_in_order_with_143(tmp_path: pathlib.Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    with FakeCore(f"ipc://{tmp_path}/core", model=str(folder)) as core:
        core.gate.clear()
        command = [sys.executable, "-m", "folovllm", "generate", "abc", "--engine", core.endpoint]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert core.wait_until(lambda: len(core.live) == 1)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (143, "")
