"""The core process under faults: frames that are none, peers that break the protocol, workers that fail or die."""

import os
import pathlib
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from folovllm.common.messages.core_worker import ModelRunnerOutput, PromptLogprobs, SamplingRow
from folovllm.common.messages.frontend_core import AddRequests, GetStats
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, Failed, Hello
from folovllm.common.transport import encode
from tests.fakes.core_engine import is_empty, running_core, wait_until_empty
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent
from tests.fakes.fake_worker import FakeModel, Script, WorkerControl, expected_output
from tests.fakes.simulated_logprobs import Place, pack

GREEDY = SamplingRow()
NUM_RANDOM_FRAMES = 1000
BOUND_S = 30.0


@pytest.fixture
def parent(tmp_path: pathlib.Path) -> Iterator[FakeParent]:
    with running_core(tmp_path, Script(num_blocks=512)) as (parent, _):
        yield parent


@contextmanager
def controlled(folder: pathlib.Path, **options: object) -> Iterator[tuple[FakeParent, FakeFrontend, WorkerControl]]:
    """A core whose worker is the test itself."""
    with WorkerControl(folder) as worker:
        script = Script(num_blocks=64, control=worker.endpoint)
        with running_core(folder, script, "", **options) as (parent, _), FakeFrontend(parent.endpoint) as frontend:
            yield parent, frontend, worker


def random_frames(seed: int) -> Iterator[bytes]:
    generator = random.Random(seed)
    valid = encode(AddRequests([make_request(1, [1, 2, 3], 5)]))
    for index in range(NUM_RANDOM_FRAMES):
        if index % 4:
            yield generator.randbytes(generator.randrange(200))
        else:  # a message with one byte changed and its end cut off; cut by little it may be whole, thanks to defaults
            broken = bytearray(valid)
            broken[generator.randrange(8)] = generator.randrange(256)
            yield bytes(broken[: generator.randrange(len(broken) - 8)])


# ---- frontends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([encode(Hello("worker", PROTOCOL_VERSION, 1, "x"))], "not a worker"),
        ([encode(Hello("frontend", PROTOCOL_VERSION + 1, 1, "x"))], f"speaks protocol {PROTOCOL_VERSION}"),
        ([encode(GetStats(1))], "must be Hello"),
        ([b""], "no valid message"),
        ([b"\xc1"], "no valid message"),
        ([encode(GetStats(1)), b"more"], "one frame"),
        ([encode(Failed("x", "y", "z", ""))], "no valid message"),
    ],
)
def test_a_wrong_first_frame_is_answered_and_a_right_one_still_works(
    parent: FakeParent, frames: list[bytes], reason: str
) -> None:
    with FakeFrontend(parent.endpoint, greet=False) as frontend:
        frontend.send_raw(*frames)
        while not frontend.bad_frames:
            frontend.receive()
        assert reason in frontend.bad_frames[0]
        assert frontend.greet().block_size == 4


def test_random_frames_of_a_frontend_harm_no_running_request(parent: FakeParent) -> None:
    with FakeFrontend(parent.endpoint) as frontend, FakeFrontend(parent.endpoint) as bad:
        frontend.add(*(make_request(number, [number], 300, stream=number % 2 == 0) for number in range(4)))
        for frame in random_frames(seed=4):
            bad.send_raw(frame)
        while len(bad.bad_frames) < NUM_RANDOM_FRAMES:
            bad.receive()
        bad.add(make_request(7, [7], 5))
        assert bad.output(7) == expected_output([7], 5, GREEDY)
        for number in range(4):
            assert frontend.output(number) == expected_output([number], 300, GREEDY)
        assert is_empty(frontend.stats())
        assert not frontend.bad_frames


def test_a_second_hello_begins_anew_and_aborts_what_ran(parent: FakeParent) -> None:
    with FakeFrontend(parent.endpoint) as frontend:
        frontend.add(make_request(1, [1], 1500, stream=True))
        while not frontend.tokens[1]:
            frontend.receive()
        frontend.welcome = None
        frontend.greet()
        assert wait_until_empty(frontend).num_frontends == 1


def test_frames_of_the_parent_after_the_start_are_refused(parent: FakeParent) -> None:
    parent.send_raw(b"\xc1nonsense")
    assert "no valid message" in str(parent.receive())
    with FakeFrontend(parent.endpoint) as frontend:
        frontend.add(make_request(1, [1], 5))
        assert frontend.output(1) == expected_output([1], 5, GREEDY)


# ---- the worker ------------------------------------------------------------------------------------------------------


def test_random_frames_of_the_worker_harm_no_running_request(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path) as (_, frontend, worker):
        frontend.add(make_request(1, [1, 2, 3], 8, stream=True))
        model = FakeModel(block_size=4)
        for frame in random_frames(seed=5):
            worker.send_raw(b"out", frame)
        for _ in range(8):
            worker.answer(model.execute(worker.next_step()))
        assert frontend.output(1) == expected_output([1, 2, 3], 8, GREEDY)
        while len(worker.bad_frames) < NUM_RANDOM_FRAMES:
            worker.receive()


def test_answers_to_other_steps_or_of_the_wrong_length_are_refused(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path, pipeline_depth=1) as (_, frontend, worker):
        frontend.add(make_request(1, [1, 2, 3], 2, stream=True))
        model = FakeModel(block_size=4)
        step = worker.next_step()
        worker.answer(ModelRunnerOutput(step.step_id + 5, b"\x01\x00\x00\x00"))
        worker.answer(ModelRunnerOutput(step.step_id, b"\x01\x00\x00\x00" * 2))
        worker.answer(ModelRunnerOutput(step.step_id, b"\x01\x00\x00"))
        worker.answer(model.execute(step))
        worker.answer(model.execute(worker.next_step()))
        assert frontend.output(1) == expected_output([1, 2, 3], 2, GREEDY)
        frontend.add(make_request(2, [1], 1))
        worker.next_step()
        assert len(worker.bad_frames) == 3


def test_log_probabilities_are_passed_on_and_broken_ones_refused(tmp_path: pathlib.Path) -> None:
    places = [Place([(5, -0.5), (6, -0.25)], 2)]
    with controlled(tmp_path, pipeline_depth=1) as (_, frontend, worker):
        sampling = SamplingRow(logprobs=1, prompt_logprobs=1)
        frontend.add(make_request(1, [1, 2], 1, stream=True, sampling=sampling))
        step = worker.next_step()
        right = msgspec.structs.replace(
            FakeModel(block_size=4).execute(step),
            logprob_rows=b"\0\0\0\0",
            logprobs=pack(places),
            prompt_logprobs=[PromptLogprobs(0, 1, pack(places))],
        )
        worker.answer(msgspec.structs.replace(right, logprobs=pack(places * 2)))
        worker.answer(msgspec.structs.replace(right, prompt_logprobs=[PromptLogprobs(0, 1, pack(places * 2))]))
        worker.answer(right)
        frontend.wait_for(1)
        assert frontend.logprobs[1] == frontend.prompt_logprobs[1] == places
        while len(worker.bad_frames) < 2:
            worker.receive()


def test_L25_a_failed_step_fails_its_requests_only(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path, pipeline_depth=1, max_num_seqs=2) as (_, frontend, worker):
        frontend.add(*(make_request(number, [number], 3, stream=True) for number in range(3)))
        failing = worker.next_step()
        worker.answer(ModelRunnerOutput(failing.step_id, error="out of memory in layer 3"))
        frontend.wait_for(0, 1)
        for number in (0, 1):
            assert frontend.finished[number].finish_reason == "error"
            assert "out of memory in layer 3" in frontend.finished[number].error
        model = FakeModel(block_size=4)
        for _ in range(3):
            worker.answer(model.execute(worker.next_step()))
        assert frontend.output(2) == expected_output([2], 3, GREEDY)
        assert is_empty(frontend.stats())


def test_abort_between_a_step_and_its_answer(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path) as (_, frontend, worker):
        frontend.add(make_request(1, [1, 2], 50, stream=True))
        step = worker.next_step()
        frontend.abort(1)
        frontend.stats()  # the abort was read
        frontend.add(make_request(1, [3, 4], 2, stream=True))
        model = FakeModel(block_size=4)
        worker.answer(model.execute(step))
        for _ in range(3):  # the second step of the aborted request, two of the one that came after
            worker.answer(model.execute(worker.next_step()))
        assert frontend.output(1) == expected_output([3, 4], 2, GREEDY)


def test_a_worker_that_reports_its_end_ends_an_engine_without_restarts_with_its_words(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path, max_worker_restarts=0) as (parent, frontend, worker):
        frontend.add(make_request(1, [1], 50))
        worker.next_step()
        worker.send_raw(b"out", encode(Failed("worker-0", "RuntimeError", "the device is lost", "Traceback: ...")))
        while not frontend.failures:
            frontend.receive()
        assert "the device is lost" in frontend.failures[0]
        assert parent.failure().message == "the device is lost (max_worker_restarts=0: it is not replaced)"
        assert parent.core.wait(BOUND_S)
        assert parent.core.exit_code() == 1


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_worker_ends_an_engine_without_restarts_with_the_cause(tmp_path: pathlib.Path, busy: bool) -> None:
    with controlled(tmp_path, max_worker_restarts=0) as (parent, frontend, worker):
        if busy:
            frontend.add(make_request(1, [1], 50))
            worker.next_step()
        (worker_process,) = psutil.Process(parent.core.pid).children()
        os.kill(worker_process.pid, signal.SIGKILL)
        while not frontend.failures:
            frontend.receive()
        assert "was killed by SIGKILL" in frontend.failures[0]
        assert "was killed by SIGKILL" in parent.failure().message
        assert parent.core.wait(BOUND_S)
        assert parent.core.exit_code() == 1
        assert not parent.runtime_dir.exists()


def test_a_worker_that_ends_tells_its_exit_code(tmp_path: pathlib.Path) -> None:
    with controlled(tmp_path, max_worker_restarts=0) as (parent, _, worker):
        worker.send_raw(b"exit", b"7")
        assert "ended with exit code 7" in parent.failure().message


def test_L36_stopped_processes_go_on_where_they_were(parent: FakeParent) -> None:
    (worker_process,) = psutil.Process(parent.core.pid).children()
    with FakeFrontend(parent.endpoint) as frontend:
        for pid in (parent.core.pid, worker_process.pid):
            frontend.add(make_request(pid, [1], 600, stream=True))
            while not frontend.tokens[pid]:
                frontend.receive()
            os.kill(pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            assert frontend.output(pid) == expected_output([1], 600, GREEDY)
