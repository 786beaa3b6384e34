"""`folovllm engine`: frontends that come and go, that vanish, and the ends of a daemon."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from folovllm import LLM, EngineDeadError, SamplingParams
from tests.integration.conftest import (
    END_TIMEOUT_S,
    ENDLESS,
    ROOM,
    ROOT,
    Daemon,
    eventually,
    is_idle,
    left_of,
    runtime_dirs,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=500, ignore_eos=True)


def test_it_prints_the_table_and_how_to_connect(daemon: Daemon) -> None:
    text = "".join(daemon.lines)
    assert "load weights" in text
    assert "KV cache" in text
    assert f"LLM(engine='{daemon.endpoint}')" in text


def test_frontends_come_and_go_and_each_has_its_own_requests(daemon: Daemon) -> None:
    with LLM(engine=daemon.endpoint) as first:
        expected = [output.outputs[0].text for output in first.generate(["abc", "xyz"], GREEDY, use_tqdm=False)]
        with LLM(engine=daemon.endpoint) as second:
            assert eventually(lambda: second.get_stats().num_frontends == 2)  # others that left are missed within 1 s
            ours, theirs = first.stream("abc", GREEDY), second.stream("xyz", GREEDY)  # the same numbers on both sides
            assert "".join(delta.outputs[0].text for delta in ours) == expected[0]
            assert "".join(delta.outputs[0].text for delta in theirs) == expected[1]
        assert first.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text == expected[0]
        assert eventually(lambda: first.get_stats().num_frontends == 1)


def test_L23_an_abort_hits_the_own_request_only(daemon: Daemon) -> None:
    with LLM(engine=daemon.endpoint) as first, LLM(engine=daemon.endpoint) as second:
        mine, theirs = first.stream("abc", LONG), second.stream("abc", LONG)
        next(mine)
        mine.close()
        assert sum(len(delta.outputs[0].token_ids) for delta in theirs) == 500
        assert eventually(lambda: is_idle(second))


@pytest.mark.parametrize("how", ["close", "SIGKILL"])
def test_L22_the_requests_of_a_frontend_that_vanishes_are_aborted(daemon: Daemon, how: str) -> None:
    with LLM(engine=daemon.endpoint) as watching:
        if how == "close":
            other = LLM(engine=daemon.endpoint)
            streams = [other.stream("abc", LONG) for _ in range(300)]  # some are at work for many seconds
            assert eventually(lambda: watching.get_stats().num_running > 0)
            other.close()
            assert len(streams) == 300
        else:
            _start_and_kill_a_frontend(daemon, watching)
        assert eventually(lambda: is_idle(watching) and watching.get_stats().num_frontends == 1)


def _start_and_kill_a_frontend(daemon: Daemon, watching: LLM) -> None:
    code = (
        "import sys; from folovllm import LLM, SamplingParams; llm = LLM(engine=sys.argv[1])\n"
        "while True: llm.generate(['abc'] * 300, SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code, daemon.endpoint], cwd=ROOT) as process:
        try:
            assert eventually(lambda: watching.get_stats().num_running > 0, timeout_s=30)
        finally:
            process.kill()


def test_threads_share_an_llm_one_call_after_another(daemon: Daemon) -> None:
    texts: dict[int, str] = {}
    with LLM(engine=daemon.endpoint) as llm:
        expected = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text

        def call(i: int) -> None:
            texts[i] = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text

        threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert texts == dict.fromkeys(range(6), expected)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order(
    start_daemon: Callable[..., Daemon], roomy_folder: pathlib.Path, number: int, code: int
) -> None:
    daemon = start_daemon(*ROOM, folder=roomy_folder)
    daemon.wait_ready()
    with LLM(engine=daemon.endpoint) as llm:
        stream = llm.stream("abc", ENDLESS)
        next(stream)
        got, errors, left = daemon.end(number)
        assert (got, left) == (code, [])
        assert "Traceback" not in errors
        with pytest.raises(EngineDeadError):
            list(stream)
    assert runtime_dirs(daemon.process.pid) == []
    assert not pathlib.Path(daemon.endpoint.removeprefix("ipc://")).exists()


def test_L35_sigkill_leaves_nothing(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    daemon.wait_ready()
    _, _, left = daemon.end(signal.SIGKILL)
    assert left == []
    assert runtime_dirs(daemon.process.pid) == []


@pytest.mark.parametrize("victim", ["core", "worker"])
def test_the_death_of_a_process_ends_it_with_1_and_the_cause(
    start_daemon: Callable[..., Daemon], roomy_folder: pathlib.Path, victim: str
) -> None:
    daemon = start_daemon("--max-worker-restarts", "0", *ROOM, folder=roomy_folder)
    daemon.wait_ready()
    family = daemon.family()
    module = f"folovllm.{victim}_proc"
    with LLM(engine=daemon.endpoint) as llm:
        stream = llm.stream("abc", ENDLESS)
        next(stream)
        next(process for process in family if module in process.cmdline()).send_signal(signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            list(stream)
    code, errors, left = daemon.outcome(family)
    assert (code, left) == (1, [])
    assert "SIGKILL" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("Error: ")


def test_L37_an_endpoint_in_use_is_told_before_the_model_is_loaded(
    daemon: Daemon, start_daemon: Callable[..., Daemon]
) -> None:
    second = start_daemon(endpoint=daemon.endpoint)
    output, errors = second.process.communicate(timeout=60)
    assert second.process.returncode in {1, 2}
    assert "ready" not in output
    assert "in use" in errors.splitlines()[-1]
    assert "worker" not in errors
    with LLM(engine=daemon.endpoint) as llm:
        assert len(llm.generate("abc", GREEDY, use_tqdm=False)) == 1


def test_L35_sigint_twice_while_loading(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    own = psutil.Process(daemon.process.pid)
    assert eventually(lambda: len(own.children(recursive=True)) >= 2, timeout_s=60), "core and worker have begun"
    family = daemon.family()
    os.kill(daemon.process.pid, signal.SIGINT)
    os.kill(daemon.process.pid, signal.SIGINT)
    _, errors = daemon.process.communicate(timeout=END_TIMEOUT_S)
    assert daemon.process.returncode == 130
    assert "Traceback" not in errors
    assert left_of(family) == []
    assert runtime_dirs(daemon.process.pid) == []


def test_tcp_is_encrypted_and_needs_the_key(start_daemon: Callable[..., Daemon], tmp_path: pathlib.Path) -> None:
    daemon = start_daemon(endpoint=f"tcp://127.0.0.1:*?key={tmp_path}/key")
    daemon.wait_ready()
    assert daemon.endpoint.startswith("tcp://127.0.0.1:")
    assert not daemon.endpoint.startswith("tcp://127.0.0.1:*")
    with LLM(engine=daemon.endpoint) as llm:
        assert len(llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8
    assert daemon.end(signal.SIGTERM)[0] == 143
