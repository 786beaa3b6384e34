"""`folovllm bench`: options, output, files, exit codes."""

import importlib.util
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from folovllm.frontend import int32
from folovllm.frontend.cli.main import run
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.scripted_server import Answer, Asked, ScriptedServer, as_json, chat_events, events, models
from tests.sources import ROOT
from tests.unit.frontend.conftest import Run

Script = Callable[[Asked], Answer]


def answers(asked: Asked) -> Answer:
    if asked.path.endswith("/models"):
        return models("one", "two")
    if asked.path.endswith("/chat/completions"):
        return chat_events("a", "b")
    return events({"choices": [{"index": 0, "text": "a"}]}, {"choices": [{"index": 0, "text": "b"}]}, "[DONE]")


def bodies(server: ScriptedServer) -> list[dict[str, Any]]:
    return [asked.body for asked in server.asked if asked.body]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(server: ScriptedServer, *args: str) -> tuple[int, str, str]:
        code = run(["bench", "serve", "--base-url", server.url, "--disable-tqdm", "--num-prompts", "3", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_run_with_defaults(bench: Run) -> None:
    with ScriptedServer(answers) as server:
        code, out, err = bench(server)
    assert (code, err) == (0, "")
    assert len(bodies(server)) == 4, "and a warm-up"
    body = bodies(server)[-1]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("one", 128, 0.0)
    assert len(body["prompt"].split()) == 1024 and "ignore_eos" not in body
    assert "answered requests" in out and "p99" in out


def test_options_arrive(bench: Run) -> None:
    with ScriptedServer(answers) as server:
        args = (
            "--backend",
            "chat",
            "--model",
            "two",
            "--api-key",
            "k",
            "--random-input-len",
            "5",
            "--num-warmups",
            "0",
        )
        more = ("--random-output-len", "7", "--random-prefix-len", "2", "--ignore-eos", "--top-p", "0.5", "--seed", "3")
        code, _, err = bench(server, *args, *more, "--extra-body", '{"top_k": 4}', "--temperature", "0.7")
        assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}, (
            "a model that is named is not asked for"
        )
        assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer k"}
    assert (code, err) == (0, "")
    body = bodies(server)[0]
    assert len(body["messages"][0]["content"].split()) == 7
    fields = ("model", "max_tokens", "ignore_eos", "top_p", "top_k", "temperature")
    assert [body[name] for name in fields] == ["two", 7, True, 0.5, 4, 0.7]


@pytest.mark.parametrize(
    "goodput", [["--goodput", "ttft:9e9", "tpot:9e9"], ["--goodput=ttft:9e9", "--goodput=tpot:9e9"]]
)
def test_goodput_takes_several_bounds(bench: Run, goodput: list[str]) -> None:
    with ScriptedServer(answers) as server:
        code, out, _ = bench(server, *goodput, "--metric-percentiles", "25,75")
    assert code == 0
    assert "good requests/s (ttft ≤ 9e+09 ms, tpot ≤ 9e+09 ms)" in out
    assert "p25" in out and "p75" in out and "p99" not in out


def test_the_result_is_saved_with_a_picture(bench: Run, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "new"
    with ScriptedServer(answers) as server:
        code, out, _ = bench(server, "--save-result", "--result-dir", str(folder), "--metadata", "machine=mine")
        (file,) = folder.glob("completions-infqps-one-*.json")
        saved = json.loads(file.read_text())
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert code == 0 and f"wrote {file}" in out
        assert (saved["machine"], saved["completed"], saved["model_id"]) == ("mine", 3, "one")
        assert "ttfts" not in saved
        _, _, err = bench(server, "--save-result", "--result-dir", str(file))
        assert err.startswith("Error: the result cannot be written")


def test_a_sharegpt_file(bench: Run, tmp_path: pathlib.Path, model_folder: pathlib.Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"conversations": [{"value": "abcdefgh" * 3}, {"value": "xyz" * 9}]}]))
    args = ("--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-warmups", "0")
    with ScriptedServer(answers) as server:
        assert bench(server, *args)[0] == bench(server, *args, "--tokenizer", str(model_folder))[0] == 0
        assert bench(server, *args, "--sharegpt-output-len", "5")[0] == 0
    assert {body["prompt"] for body in bodies(server)} == {"abcdefgh" * 3}
    assert [bodies(server)[i]["max_tokens"] for i in (0, 3, 6)] == [7, 27, 5], "estimated, counted, given"


def test_sharegpt_like_lengths(bench: Run) -> None:
    with ScriptedServer(answers) as server:
        assert bench(server, "--dataset-name", "sharegpt-like")[0] == 0
    assert len({len(body["prompt"].split()) for body in bodies(server)}) > 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset-name", "sharegpt"], "give --dataset-path, or take sharegpt-like"),
        (["--dataset-path", "x"], "--dataset-path goes with --dataset-name sharegpt, not with random"),
        (
            ["--dataset-name", "sharegpt-like", "--random-input-len", "5"],
            "--random-input-len goes with --dataset-name random, not with sharegpt-like",
        ),
        (["--extra-body", "{"], "--extra-body is no JSON"),
        (["--extra-body", "[1]"], "--extra-body must be an object"),
        (["--metadata", "x"], "'x' is no KEY=VALUE"),
        (["--metric-percentiles", "a"], "'a' are no percentiles"),
        (["--metric-percentiles", "50,100"], "percentile 100 must lie between 0 and 100"),
        (["--goodput", "ttft"], "no METRIC:MILLISECONDS"),
        (["--request-rate", "0"], "--request-rate 0.0 must be above 0"),
        (["--burstiness", "0", "--request-rate", "1"], "--burstiness 0.0 must be"),
        (["--random-range-ratio", "2"], "range ratio 2.0"),
        (["--save-detailed"], "give it too"),
        (["stray"], "unexpected extra argument"),
    ],
)
def test_wrong_input_is_told_before_anything_is_sent(bench: Run, args: list[str], message: str) -> None:
    with ScriptedServer(answers) as server:
        code, out, err = bench(server, *args)
    assert (code, out, bodies(server)) == (2, "", [])
    assert message in err and "Traceback" not in err


def test_servers_that_do_not_answer(bench: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(asked: Asked) -> Answer:
        return models("one") if asked.path.endswith("/models") else as_json({"error": {"message": "no"}}, 404)

    with ScriptedServer(refuses) as server:
        code, _, err = bench(server)
        assert (code, "the first request to" in err, "status 404" in err) == (2, True, True)
        code, out, err = bench(server, "--num-warmups", "0")
    assert code == 1 and "failed requests" in out and err.startswith("\nfailed:\nstatus 404")
    with ScriptedServer(lambda _: as_json({"error": {"message": "no key"}}, 401)) as server:
        assert "answers 401: no key" in bench(server)[2]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert run(["bench", "serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "no server answers at http://127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://user:hidden@127.0.0.1:9", "http://127.0.0.1:9/v1?key=1"])
def test_what_a_url_would_lose_is_refused_with_a_model_too(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--base-url", url, "--model", "m"]) == 2
    assert "which is not sent" in capsys.readouterr().err


def test_paths(bench: Run) -> None:
    with ScriptedServer(answers) as server:
        assert bench(server, "--endpoint", "/other/completions")[0] == 0
        assert run(["bench", "serve", "--base-url", server.url + "/llm/v1/", "--num-prompts", "1"]) == 0
        paths = {asked.path for asked in server.asked if asked.body}
    assert paths == {"/other/completions", "/llm/v1/completions"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_hangs_up(number: int, code: int) -> None:
    asked, end = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        asked.set()
        assert end.wait(60)
        yield b""

    def never_answers(asked: Asked) -> Answer:
        return Answer(parts()) if asked.body else models("one")

    with ScriptedServer(never_answers) as server:
        command = [sys.executable, "-m", "folovllm", "bench", "serve", "--base-url", server.url, "--num-warmups", "0"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert asked.wait(60)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        end.set()
    assert process.returncode == code
    assert "Traceback" not in errors


@pytest.mark.parametrize("name, args", [("aiohttp", []), ("matplotlib", ["--save-result"])])
def test_a_missing_library_is_named(bench: Run, monkeypatch: pytest.MonkeyPatch, name: str, args: list[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    with ScriptedServer(answers) as server:
        code, _, err = bench(server, *args)
    assert code == 2 and f"{name} is not installed" in err and "folovllm[bench]" in err


def test_latency(folo: Run, core: FakeCore, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "out" / "latency.json"
    args = ("--input-len", "6", "--output-len", "2", "--batch-size", "3", "--num-iters-warmup", "1", "--num-iters", "2")
    code, out, err = folo(
        "bench", "latency", *args, "--percentiles", "50", "--output-json", str(file), "--disable-tqdm"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("mean ") and out.splitlines()[1].startswith("p50 ")
    saved = json.loads(file.read_text())
    assert (saved["batch_size"], saved["input_len"], saved["output_len"], len(saved["latencies"])) == (3, 6, 2, 2)
    assert len(core.requests) == 9


def test_throughput(folo: Run, core: FakeCore, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "run.json"
    args = ("--num-prompts", "4", "--input-len", "3", "--output-len", "2", "--disable-tqdm")
    code, out, err = folo("bench", "throughput", *args, "--output-json", str(file))
    assert (code, err) == (0, "")
    assert " requests/s, " in out and " output tokens/s" in out
    assert json.loads(file.read_text())["num_requests"] == len(core.requests) == 4
    assert {request.max_tokens for request in core.requests} == {2}


def test_throughput_of_a_file(folo: Run, core: FakeCore, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"conversations": [{"value": "abcdefgh"}, {"value": "stuvwxyz"}]}]))
    args = ("--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "2", "--disable-tqdm")
    assert folo("bench", "throughput", *args)[0] == 0
    assert [(int32.unpack(r.prompt_token_ids)[0], r.max_tokens) for r in core.requests] == [(97, 8), (97, 8)]


@pytest.mark.parametrize(
    "args, message",
    [
        (["throughput", "--dataset-path", "x"], "--dataset-path goes with --dataset-name sharegpt"),
        (["throughput", "--input-len", "100", "--num-prompts", "1"], "the prompt has"),
        (["latency", "--percentiles", "x"], "no percentiles"),
        (["latency", "--batch-size", "0"], "0 is not in the range"),
        (["latency", "--block-size", "8"], "block_size cannot be given with engine="),
    ],
)
def test_wrong_input_offline(folo: Run, args: list[str], message: str) -> None:
    code, out, err = folo("bench", *args, "--disable-tqdm")
    assert (code, out) == (2, "")
    assert message in err
