"""What a real core records, logs and ends in time: traces, the line about its state, time limits."""

import os
import pathlib
import signal

import pytest

from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.trace_file import Arrived, Resulted, Scheduled, Stopped, TraceReader, read_run
from folovllm.core_proc.replay import replay
from tests.fakes.core_engine import one_frontend, running_core
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent, make_model_dir
from tests.fakes.fake_worker import Script, expected_output

GREEDY = SamplingRow()
BOUND_S = 30.0


def test_a_recorded_run_is_made_again_with_the_same_decisions(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace"
    script = Script(num_blocks=24)
    with one_frontend(tmp_path, script, trace_file=str(path), max_num_seqs=6, max_num_batched_tokens=16) as frontend:
        frontend.add(*(make_request(number, [7] * (9 + number), 30, stream=True) for number in range(8)))
        frontend.add(make_request(20, [1, 2, 3], 5, n=3), make_request(30, [4], 2000))
        frontend.wait_for(*range(8), 20, 21, 22)
        frontend.abort(30)
        assert frontend.stats().num_running == 0
    header, records = read_run(TraceReader(path))
    assert (header.block_size, header.num_blocks, header.max_num_batched_tokens) == (4, 23, 16)
    kinds = [type(record) for record in records]
    assert (kinds.count(Arrived), kinds.count(Stopped)) == (12, 1)
    assert kinds.count(Scheduled) >= kinds.count(Resulted) > 30
    assert sum(len(record.preempted) for record in records if isinstance(record, Scheduled)) > 0
    assert replay(header, records) == (kinds.count(Scheduled), "")


def test_a_trace_survives_a_core_that_is_killed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace"
    with (
        running_core(tmp_path, Script(), trace_file=str(path)) as (parent, _),
        FakeFrontend(parent.endpoint) as frontend,
    ):
        frontend.add(make_request(1, [1, 2], 20, stream=True))
        frontend.wait_for(1)
        num_pings = frontend.num_pings
        while frontend.num_pings < num_pings + 2:  # a second later at most it is in the file
            frontend.receive()
        os.kill(parent.core.pid, signal.SIGKILL)
        assert parent.core.wait(BOUND_S)
    _, records = read_run(TraceReader(path))
    assert sum(isinstance(record, Resulted) for record in records) == 20


def test_a_trace_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: pathlib.Path) -> None:
    config = EngineConfig(
        model=str(make_model_dir(tmp_path / "model", Script())), trace_file=str(tmp_path / "gone" / "trace")
    )
    with FakeParent() as parent:
        parent.configure(config)
        failure = parent.failure()
        assert failure.error_type == "ConfigError"
        assert "gone/trace cannot be written" in failure.message


def test_a_time_limit_ends_a_request_with_what_it_has(tmp_path: pathlib.Path) -> None:
    with one_frontend(tmp_path, Script(num_blocks=512), max_num_seqs=1) as frontend:
        frontend.add(  # in one message, so that nothing that holds this process up makes the second outlast the first
            make_request(1, [1, 2], 1_000_000, timeout_s=0.3),
            make_request(2, [3], 5, timeout_s=0.1),
            make_request(3, [4], 5, timeout_s=600.0),
        )
        frontend.wait_for(1, 2, 3)
        first, second, third = (frontend.finished[number].finish_reason for number in (1, 2, 3))
        assert (second, third) == ("timeout", "length")
        assert first in ("timeout", "length")  # a quick machine fills the pool in time
        answer = frontend.output(1)
        assert answer == expected_output([1, 2], len(answer), GREEDY)
        assert frontend.output(2) == []
        assert 0.1 <= frontend.finished[2].total_s < BOUND_S
        assert frontend.output(3) == expected_output([4], 5, GREEDY)


def test_the_state_is_logged(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    with one_frontend(tmp_path, Script(), log_interval_s=0.2, log_level="info") as frontend:
        for number in range(2000):
            frontend.add(make_request(number, [1, 2], 20))
            frontend.wait_for(number)
            if "Running" in (text := capfd.readouterr().err):
                break
        else:
            pytest.fail("no line about the state in 2,000 requests")
    (line, *_) = [line for line in text.splitlines() if "Running" in line]
    for part in ("INFO", "Waiting: 0 reqs", "KV cache usage: ", "Prefix cache hit rate: ", "Prompt: ", "Generation: "):
        assert part in line
