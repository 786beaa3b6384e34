"""`folovllm serve` through all processes and over real sockets: lives and deaths, keys, TLS, several processes."""

import contextlib
import json
import pathlib
import signal
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from folovllm import LLM, SamplingParams
from tests.fakes.trace_collector import Collector
from tests.integration.conftest import ENDLESS_BODY, ROOM, Daemon, eventually, is_idle, runtime_dirs
from tests.integration.serving import ServeProcess

COMP = "/v1/completions"
LONG = {"prompt": "abc", "max_tokens": 490, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(daemon: Daemon) -> Iterator[ServeProcess]:
    """A server that dials the module's daemon."""
    made = ServeProcess(["--engine", daemon.endpoint, "--served-model-name", "tiny"])
    try:
        yield made.wait_ready()
    finally:
        made.close()


@pytest.fixture
def start(tiny_folder: pathlib.Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts servers with an engine of their own that are gone after the test."""
    started: list[ServeProcess] = []

    def make(*options: str, folder: pathlib.Path = tiny_folder, env: dict[str, str] | None = None) -> ServeProcess:
        started.append(ServeProcess.of_model(folder, *options, env=env))
        return started[-1].wait_ready()

    yield make
    for process in started:
        process.close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def lines_of(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_its_answers_are_those_of_the_engine(server: ServeProcess, daemon: Daemon) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(engine=daemon.endpoint) as llm, server.client() as http:
        expected = llm.generate("abc", params, use_tqdm=False)[0].outputs[0].text
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        assert http.post(COMP, json=body).json()["choices"][0]["text"] == expected
        with http.stream("POST", COMP, json=body | {"stream": True}) as response:
            assert "".join(event["choices"][0]["text"] for event in lines_of(response)) == expected


def test_L22_broken_off_streams_leave_nothing(server: ServeProcess, daemon: Daemon) -> None:
    """300 streams whose client goes away behind the first token, and 24 answers that nobody waits for."""

    def break_off_streams() -> None:
        with httpx.Client(base_url=server.url, timeout=60.0) as http:
            for _ in range(50):
                with http.stream("POST", COMP, json=LONG | {"stream": True}) as response:
                    next(lines_of(response))

    def give_up() -> None:
        with httpx.Client(base_url=server.url, timeout=60.0) as http:
            for _ in range(12):
                with contextlib.suppress(httpx.ReadTimeout):  # a client that is held up finds its answer there
                    http.post(COMP, json=LONG, timeout=httpx.Timeout(60.0, read=0.02))

    threads = [threading.Thread(target=break_off_streams) for _ in range(6)]
    threads += [threading.Thread(target=give_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with LLM(engine=daemon.endpoint) as llm, server.client() as http:
        assert eventually(lambda: is_idle(llm))
        assert http.post(COMP, json={"prompt": "abc"}).status_code == 200
        metrics = http.get("/metrics").text
    assert 'folovllm:num_requests_running{model_name="tiny"} 0.0' in metrics
    assert 'folovllm:kv_cache_usage_perc{model_name="tiny"} 0.0' in metrics


def test_L27_keys_from_the_environment(start: Callable[..., ServeProcess]) -> None:
    server = start(env={"FOLOVLLM_API_KEYS": "k1,k2"})
    with server.client() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer k2"}).status_code == 200
        slashes = httpx.get(f"{server.url}//v1/models")
        assert slashes.status_code == 401
        wrong_body = http.post(COMP, content=b"x" * 100, headers={"Authorization": "Bearer k3"})
        assert wrong_body.status_code == 401


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_running_requests_end(
    start: Callable[..., ServeProcess], collector: Collector, number: int, code: int
) -> None:
    server = start("--otlp-traces-endpoint", collector.url, "--served-model-name", "tiny")
    outcome: list[dict[str, Any]] = []
    with server.client() as http, http.stream("POST", COMP, json=LONG | {"stream": True}) as response:
        events = lines_of(response)
        next(events)
        family = server.family()
        server.process.send_signal(number)
        outcome = list(events)
    assert outcome[-1]["choices"][0]["finish_reason"] == "length"
    got, errors, left = server.outcome(family)
    assert (got, left) == (code, 0)
    assert "Traceback" not in errors
    assert collector.span_names() == ["text_completion tiny"]  # what was in work when the signal came is recorded too
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_what_takes_longer_than_the_drain_timeout_is_aborted(
    start: Callable[..., ServeProcess], roomy_folder: pathlib.Path
) -> None:
    server = start("--drain-timeout", "0", *ROOM, folder=roomy_folder)
    with server.client() as http, http.stream("POST", COMP, json=ENDLESS_BODY | {"stream": True}) as response:
        events = lines_of(response)
        next(events)
        family = server.family()
        server.process.send_signal(signal.SIGTERM)
        assert list(events)[-1]["choices"][0]["finish_reason"] == "abort"
    assert server.outcome(family)[0::2] == (143, 0)


def test_the_end_of_the_engine_ends_the_server_with_its_cause(start: Callable[..., ServeProcess]) -> None:
    server = start()
    family = server.family()
    core = next(process for process in family if "folovllm.core_proc" in process.cmdline())
    core.kill()
    code, errors, left = server.outcome(family)
    assert (code, left) == (1, 0)
    assert "SIGKILL" in errors.splitlines()[-1]


def test_L36_a_stuck_engine_is_no_healthy_one(start: Callable[..., ServeProcess], roomy_folder: pathlib.Path) -> None:
    """On a machine that is held up, 0.3 s may pass without an answer of an engine that is well: it is asked again."""
    server = start("--health-timeout", "0.3", *ROOM, folder=roomy_folder)
    core = next(process for process in server.family() if "folovllm.core_proc" in process.cmdline())
    with server.client() as http, contextlib.ExitStack() as stack:
        responses: list[httpx.Response] = []

        def has_begun() -> bool:
            body = ENDLESS_BODY | {"stream": True}
            responses.append(stack.enter_context(http.stream("POST", COMP, json=body)))
            return responses[-1].status_code == 200

        assert eventually(has_begun)
        events = lines_of(responses[-1])
        next(events)
        core.suspend()
        try:
            stuck = http.get("/health")
            assert (stuck.status_code, stuck.json()["status"]) == (503, "stuck")
            assert http.get("/ready").status_code == 503
            page = http.get("/metrics")
            assert page.status_code == 200
            assert "folovllm:http_requests_total" in page.text
            assert "folovllm:num_requests_running" not in page.text
            assert eventually(lambda: http.post(COMP, json={"prompt": "abc"}).status_code == 503)
            last = list(events)[-1]["choices"][0]  # it is ended, as nobody knows whether it goes on
            assert last["finish_reason"] == "abort"
        finally:
            core.resume()
        assert eventually(lambda: http.get("/health").status_code == 200)
        assert eventually(lambda: http.post(COMP, json={"prompt": "abc"}).status_code == 200)


def test_tls(start: Callable[..., ServeProcess], tmp_path: pathlib.Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = start("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    assert server.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(base_url=server.url, verify=context) as http:
        assert http.get("/health").json()["status"] == "ready"


def test_several_processes_over_one_engine(start: Callable[..., ServeProcess]) -> None:
    server = start("--api-server-count", "2", "--served-model-name", "tiny")
    children = [process for process in server.family() if "folovllm.frontend.server" in process.cmdline()]
    assert len(children) == 2
    with LLM(engine=_engine_of(server)) as llm:
        assert llm.get_stats().num_frontends == 3
    body = {"prompt": "abc", "max_tokens": 2, "ignore_eos": True}
    for _ in range(20):
        assert httpx.post(server.url + COMP, json=body).status_code == 200
    with server.client() as http:
        page = http.get("/metrics").text
    assert 'folovllm:request_success_total{finished_reason="length",model_name="tiny"} 20.0' in page
    assert page.count("folovllm:num_requests_running{") == 1
    with server.client() as http, http.stream("POST", COMP, json=LONG | {"stream": True}) as response:
        events = lines_of(response)
        next(events)
        family = server.family()
        server.process.send_signal(signal.SIGTERM)
        assert list(events)[-1]["choices"][0]["finish_reason"] == "length"
    code, errors, left = server.outcome(family)
    assert (code, left) == (143, 0)
    assert "Traceback" not in errors


def _engine_of(server: ServeProcess) -> str:
    """Where the engine of a server listens: its runtime folder is named after its process."""
    (folder,) = runtime_dirs(server.process.pid)
    return f"ipc://{folder}/frontends"


def test_a_child_that_dies_ends_all(start: Callable[..., ServeProcess]) -> None:
    server = start("--api-server-count", "2")
    family = server.family()
    child = next(process for process in family if "folovllm.frontend.server" in process.cmdline())
    assert isinstance(child, psutil.Process)
    child.kill()
    code, errors, left = server.outcome(family)
    assert (code, left) == (1, 0)
    assert "killed by SIGKILL" in errors.splitlines()[-1]
