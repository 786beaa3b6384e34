"""The worker's process alone, spoken to over its socket by a fake core: start, steps, bad frames."""

import pathlib
import random
from collections.abc import Iterator

import pytest

from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, SchedulerOutput
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, ConfigureWorker, Failed, WorkerReady
from tests.fakes.fake_core import (
    BOUND_S,
    MAX_MODEL_LEN,
    FakeCore,
    engine_config,
    int32,
    ints,
    new_request,
    running_core,
    write_config,
)
from tests.fakes.simulated_logprobs import unpack

NUM_RANDOM_FRAMES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ready(folder: pathlib.Path) -> Iterator[tuple[FakeCore, WorkerReady]]:
    """One worker for all tests of this module that leave it running. Each test takes step ids of its own."""
    with running_core() as core:
        yield core, core.start(engine_config(folder))
        assert core.worker.exit_code() is None, "no test may have ended the worker"
        assert core.worker.stop(BOUND_S) == 0


def generate(core: FakeCore, slot: int, prompt: list[int], count: int, first_step: int) -> list[int]:
    """Greedy tokens of a request that runs alone, its blocks chosen by its slot."""
    blocks = list(range(1 + 16 * slot, 17 + 16 * slot))
    lens = int32([len(prompt)]) if len(prompt) > 1 else b""
    steps = [SchedulerOutput(first_step, int32([slot]), lens, [new_request(slot, prompt, blocks)])]
    steps += [SchedulerOutput(first_step + i, int32([slot])) for i in range(1, count)]
    return [token for step in steps for token in core.step(step)]


def test_hello_comes_first_and_says_who_it_is(folder: pathlib.Path) -> None:
    with running_core() as core:
        hello = core.expect_hello()
        assert (hello.role, hello.protocol, hello.pid) == ("worker", PROTOCOL_VERSION, core.worker.pid)


def test_ready_tells_blocks_device_phases_and_memory(ready: tuple[FakeCore, WorkerReady]) -> None:
    _, report = ready
    assert report.num_blocks == 65
    assert (report.device, report.dtype, report.attention_backend) == ("cpu (1 thread)", "float32", "paged")
    names = [phase.phase for phase in report.phases]
    assert names[1:] == [
        "import torch",
        "choose device, read config",
        "load weights",
        "allocate KV cache",
        "warm up",
    ]
    assert all(phase.process == "worker-0" and phase.seconds >= 0 for phase in report.phases)
    ends = [phase.start_s + phase.seconds for phase in report.phases]
    assert ends == sorted(ends)
    memory = {use.purpose: use.num_bytes for use in report.memory}
    assert memory["KV cache"] == 2 * 2 * 2 * 65 * 4 * 8 * 4  # layers, k and v, heads, blocks, tokens, head_dim, float32
    assert memory["weights"] > 0


def test_a_request_gets_the_same_tokens_alone_and_beside_others(ready: tuple[FakeCore, WorkerReady]) -> None:
    core, _ = ready
    alone = [generate(core, slot, prompt, 5, 100 + 10 * slot) for slot, prompt in enumerate(([3, 5, 7], [11, 13]))]
    new = [new_request(0, [3, 5, 7], list(range(1, 17))), new_request(1, [11, 13], list(range(17, 33)))]
    together = [core.step(SchedulerOutput(200, int32([0, 1]), int32([3, 2]), new))]
    together += [core.step(SchedulerOutput(200 + i, int32([0, 1]))) for i in range(1, 5)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_steps_may_be_sent_before_results_are_read(ready: tuple[FakeCore, WorkerReady]) -> None:
    core, _ = ready
    one_by_one = generate(core, 2, [9, 8, 7], 6, 300)
    core.send(SchedulerOutput(400, int32([2]), int32([3]), [new_request(2, [9, 8, 7], list(range(33, 49)))]))
    for i in range(1, 6):
        core.send(SchedulerOutput(400 + i, int32([2])))
    outputs = [core.expect_output() for _ in range(6)]
    assert [output.step_id for output in outputs] == list(range(400, 406))
    assert [token for output in outputs for token in ints(output.token_ids)] == one_by_one


def test_a_bad_step_is_answered_with_its_error_and_harms_nobody(ready: tuple[FakeCore, WorkerReady]) -> None:
    core, _ = ready
    expected = generate(core, 0, [1, 2, 3], 4, 500)
    core.step(SchedulerOutput(600, int32([0]), int32([3]), [new_request(0, [1, 2, 3], list(range(1, 17)))]))
    core.send(SchedulerOutput(601, int32([0, 77])))
    output = core.expect_output()
    assert output == ModelRunnerOutput(601, error="ProtocolError: slots: 77 is out of range; it must be 0 to 3")
    rest = [core.step(SchedulerOutput(602 + i, int32([0]))) for i in range(3)]
    assert [token for tokens in rest for token in tokens] == expected[1:]


def test_frames_that_are_no_message_are_answered_and_harm_nobody(
    ready: tuple[FakeCore, WorkerReady], folder: pathlib.Path
) -> None:
    core, _ = ready
    expected = generate(core, 0, [4, 5, 6], 3, 700)
    core.step(SchedulerOutput(800, int32([0]), int32([3]), [new_request(0, [4, 5, 6], list(range(1, 17)))]))
    for frames in ((b"",), (b"\x93nonsense",), (b"a", b"b"), (b"\x91\xa4step",)):
        core.send_frames(*frames)
        _, answer = core.receive()
        assert isinstance(answer, BadFrame)
        assert answer.reason
    core.send(ConfigureWorker(engine_config(folder), 0, MAX_MODEL_LEN))
    assert core.receive()[1] == BadFrame("the worker is configured already")
    core.send(BadFrame("something of yours was wrong"))  # is logged, never answered: two peers must not go on for ever
    assert [core.step(SchedulerOutput(801 + i, int32([0]))) for i in range(2)] == [[expected[1]], [expected[2]]]


def test_1000_random_frames_are_refused_and_harm_nobody(ready: tuple[FakeCore, WorkerReady]) -> None:
    core, _ = ready
    expected = generate(core, 1, [21, 22], 3, 900)
    core.step(SchedulerOutput(950, int32([1]), int32([2]), [new_request(1, [21, 22], list(range(17, 33)))]))
    chance = random.Random(0)
    for _ in range(NUM_RANDOM_FRAMES):
        core.send_frames(chance.randbytes(chance.randrange(64)))
    for _ in range(NUM_RANDOM_FRAMES):
        assert isinstance(core.receive()[1], BadFrame)
    assert [core.step(SchedulerOutput(951 + i, int32([1]))) for i in range(2)] == [[expected[1]], [expected[2]]]


def test_a_step_before_the_configuration_is_refused(folder: pathlib.Path) -> None:
    with running_core() as core:
        core.expect_hello()
        core.send(SchedulerOutput(0, int32([0])))
        core.send_frames(b"\xc1")
        reasons = [answer.reason for _, answer in (core.receive(), core.receive()) if isinstance(answer, BadFrame)]
        assert len(reasons) == 2
        assert "not configured yet" in reasons[0]
        core.send(ConfigureWorker(engine_config(folder), 0, MAX_MODEL_LEN))
        assert isinstance(core.receive()[1], WorkerReady)


def test_a_refused_hello_ends_the_worker_with_the_reason() -> None:
    with running_core() as core:
        core.expect_hello()
        core.send(BadFrame("protocol 99 is spoken here"))
        _, failed = core.receive()
        assert isinstance(failed, Failed)
        assert (failed.process, failed.error_type) == ("worker-0", "EngineStartError")
        assert "protocol 99 is spoken here" in failed.message
        assert core.worker.wait(BOUND_S)
        assert core.worker.exit_code() == 1


def test_an_fp8_cache_takes_a_byte_a_number_and_gives_tokens(folder: pathlib.Path) -> None:
    with running_core() as core:
        report = core.start(engine_config(folder, kv_cache_dtype="fp8"))
        assert (report.num_blocks, report.attention_backend) == (65, "torch_naive")
        assert [phase.phase for phase in report.phases][4] == "calibrate KV cache"
        assert {use.purpose: use.num_bytes for use in report.memory}["KV cache"] == 2 * 2 * 2 * 65 * 4 * 8
        assert generate(core, 0, [5, 6, 7], 6, 0) == generate(core, 1, [5, 6, 7], 6, 6)
        assert core.worker.stop(BOUND_S) == 0


@pytest.mark.parametrize(
    ("changes", "error_type", "words"),
    [
        ({"load_format": "auto"}, "ModelError", "has no weights"),
        (
            {"num_gpu_blocks_override": None, "kv_cache_memory_gb": 1e-9},
            "ConfigError",
            "kv_cache_memory_gb leaves room",
        ),
        ({"num_gpu_blocks_override": 2**31 - 1}, "ConfigError", "can be taken"),
        ({"model": "/nowhere"}, "ModelError", "/nowhere/config.json"),
        ({"attention_backend": "flash_attn"}, "ConfigError", "needs a CUDA device (this is cpu)"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "paged"}, "ConfigError", "not 'paged'"),
        ({"logits_processors": ["tests.fakes.processors:absent"]}, "ConfigError", "has no 'absent'"),
    ],
)
def test_a_start_that_fails_reports_its_cause(
    folder: pathlib.Path, changes: dict[str, object], error_type: str, words: str
) -> None:
    with running_core() as core:
        core.expect_hello()
        core.send(ConfigureWorker(engine_config(folder, **changes), 0, MAX_MODEL_LEN))
        _, failed = core.receive()
        assert isinstance(failed, Failed)
        assert failed.error_type == error_type
        assert words in failed.message
        assert "Traceback" in failed.traceback
        assert core.worker.wait(BOUND_S)
        assert core.worker.exit_code() == 1


def test_a_row_whose_constraints_leave_no_token_is_reported(folder: pathlib.Path) -> None:
    with running_core() as core:
        core.start(engine_config(folder, num_valid_token_ids=3))
        forbids_all = SamplingRow(min_tokens=2, stop_token_ids=int32([0, 1, 2]))
        new = [new_request(0, [1, 2], [1]), new_request(1, [1, 2], [2], forbids_all)]
        core.send(SchedulerOutput(0, int32([0, 1]), int32([2, 2]), new))
        output = core.expect_output()
        assert ints(output.no_token_rows) == [1]
        assert ints(output.token_ids)[0] < 3


def test_log_probabilities_and_processors_of_a_worker(folder: pathlib.Path) -> None:
    """A processor is loaded at the start; one that fails ends its request, and the others' results come with it."""
    with running_core() as core:
        only, fail = "tests.fakes.processors:only", "tests.fakes.processors:fail"
        core.start(engine_config(folder, logits_processors=[only, fail]))
        rows = [
            SamplingRow(logits_processors=[(only, "[5, 6]")], logprobs=1, prompt_logprobs=0),
            SamplingRow(logits_processors=[(fail, "1")], logprobs=0),
        ]
        new = [new_request(slot, [1, 2, 3], [slot + 1, slot + 3], row) for slot, row in enumerate(rows)]
        core.send(SchedulerOutput(0, int32([0, 1]), int32([3, 3]), new))
        core.send(SchedulerOutput(1, int32([0, 1])))
        first, second = core.expect_output(), core.expect_output()
        assert (ints(first.token_ids)[0], ints(second.token_ids)[0]) == (5, 6)
        assert (ints(first.no_token_rows), ints(second.no_token_rows)) == ([], [1])
        assert (ints(first.logprob_rows), ints(second.logprob_rows)) == ([0, 1], [0])
        (part,) = first.prompt_logprobs
        assert (part.row, part.start, ints(part.logprobs.token_ids)) == (0, 1, [2, 3])
        for output in (first, second):
            assert output.logprobs is not None
        assert [len(place.entries) for place in unpack(first.logprobs)] == [2, 1]
        assert [len(place.entries) for place in unpack(second.logprobs)] == [2]
