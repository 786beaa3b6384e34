"""The tools against a real server and a real engine: chat, load test, batch file, offline benchmarks."""

import json
import pathlib
from collections.abc import Iterator

import pytest

from folovllm.frontend.cli.main import run
from tests.integration.conftest import Daemon
from tests.integration.serving import ServeProcess

KEY = "secret"


@pytest.fixture(scope="module")
def server(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    arguments = ["--engine", daemon.endpoint, "--served-model-name", "tiny", "--api-key-file", str(keys)]
    made = ServeProcess(arguments)
    try:
        yield made.wait_ready()
    finally:
        made.close()


def test_a_server_chats_as_the_engine_does(
    server: ServeProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--quick", "hi", "--max-tokens", "8", "--temperature", "0", "--ignore-eos"]
    assert run(["chat", "--url", server.url, "--api-key", KEY, *args]) == 0
    over_http = capsys.readouterr()
    assert run(["chat", "--engine", daemon.endpoint, *args]) == 0
    assert capsys.readouterr() == over_http


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "answers 401: a valid API key is needed"),
        (("--api-key", "wrong"), "give its key with --api-key"),
        (("other", "--api-key", KEY), "answers 404: model 'other' is not served here, but tiny"),
    ],
)
def test_what_the_server_refuses(
    server: ServeProcess, args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "--url", server.url, "--quick", "hi", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["chat", "completions"])
def test_a_load_test(
    server: ServeProcess, backend: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--backend", backend, "--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "7"]
    args += [
        "--ignore-eos",
        "--max-concurrency",
        "3",
        "--save-result",
        "--save-detailed",
        "--result-filename",
        "r.json",
    ]
    args += ["--base-url", server.url, "--api-key", KEY, "--result-dir", str(tmp_path), "--disable-tqdm"]
    assert run(["bench", "serve", *args, "--goodput", "ttft:60000", "tpot:60000"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"], result["model_id"]) == (6, 0, "tiny")
    assert result["output_lens"] == [7] * 6, "as the server counts them"
    assert result["request_goodput"] == result["request_throughput"]
    assert result["max_concurrent_requests"] <= 3
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_batch_file(server: ServeProcess, daemon: Daemon, tmp_path: pathlib.Path) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    source.write_text("\n".join(json.dumps({"custom_id": str(i), **line}) for i in range(40)))
    args = ["--engine", daemon.endpoint, "--served-model-name", "tiny", "--max-in-work", "8", "--disable-tqdm"]
    assert run(["run-batch", "-i", str(source), "-o", str(sink), *args]) == 0
    outputs = [json.loads(output) for output in sink.read_text().splitlines()]
    assert sorted(int(output["custom_id"]) for output in outputs) == list(range(40))
    with server.client() as http:
        over_http = http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert {output["response"]["body"]["choices"][0]["text"] for output in outputs} == {over_http["choices"][0]["text"]}


def test_offline_benchmarks(daemon: Daemon, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--engine", daemon.endpoint, "--input-len", "5", "--output-len", "4", "--disable-tqdm"]
    more = [
        "--batch-size",
        "2",
        "--num-iters-warmup",
        "1",
        "--num-iters",
        "3",
        "--output-json",
        str(tmp_path / "l.json"),
    ]
    assert run(["bench", "latency", *common, *more]) == 0
    assert len(json.loads((tmp_path / "l.json").read_text())["latencies"]) == 3
    assert run(["bench", "throughput", *common, "--num-prompts", "5"]) == 0
    assert "output tokens/s" in capsys.readouterr().out
