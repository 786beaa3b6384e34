"""The core process with a fake worker: start, requests, admission, frontends that come and go."""

import pathlib
from collections.abc import Iterator

import pytest

from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import SamplingRow
from tests.fakes.core_engine import is_empty, one_frontend, running_core, wait_until_empty
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent, make_model_dir
from tests.fakes.fake_worker import VOCAB_SIZE, Script, expected_output, int32_bytes

GREEDY = SamplingRow()
BOUND_S = 30.0


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeParent]:
    """A core that tests share: 511 blocks of 4 tokens, each test with frontends of its own."""
    with running_core(tmp_path_factory.mktemp("core"), Script(num_blocks=512), max_model_len=1024) as (parent, _):
        yield parent


@pytest.fixture
def frontend(core: FakeParent) -> Iterator[FakeFrontend]:
    with FakeFrontend(core.endpoint) as frontend:
        yield frontend


# ---- start -----------------------------------------------------------------------------------------------------------


def test_ready_tells_endpoint_phases_and_memory(tmp_path: pathlib.Path) -> None:
    with running_core(tmp_path, Script(num_blocks=16)) as (parent, ready):
        assert ready.endpoint == f"ipc://{parent.runtime_dir}/frontends"
        assert [phase.process for phase in ready.phases] == ["core"] * 4 + ["worker-0"]
        assert all(phase.seconds >= 0 for phase in ready.phases)
        assert [use.purpose for use in ready.memory] == ["weights"]
        with FakeFrontend(ready.endpoint) as frontend:
            welcome = frontend.greet()
            assert (welcome.num_blocks, welcome.block_size, welcome.max_model_len) == (15, 4, 4096)
            assert welcome.num_valid_token_ids == VOCAB_SIZE
        assert parent.stop() == 0
        assert not parent.runtime_dir.exists()


def test_listens_on_tcp_with_the_port_the_system_chose(tmp_path: pathlib.Path) -> None:
    key_file = tmp_path / "engine.key"
    with running_core(tmp_path, Script(), listen=f"tcp://127.0.0.1:*?key={key_file}") as (_, ready):
        assert ready.endpoint.startswith("tcp://127.0.0.1:")
        with FakeFrontend(ready.endpoint) as frontend:
            frontend.add(make_request(0, [1, 2, 3], 4))
            assert frontend.output(0) == expected_output([1, 2, 3], 4, GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len=5000 is more than the model's maximum, 4096"),
        ({"model": "/nowhere"}, "cannot read /nowhere/config.json"),
    ],
)
def test_start_fails_with_its_cause(tmp_path: pathlib.Path, options: dict[str, object], message: str) -> None:
    model_dir = make_model_dir(tmp_path, Script())
    with FakeParent() as parent:
        fields: dict[str, object] = {"model": str(model_dir), **options}
        parent.configure(EngineConfig(**fields))  # type: ignore[arg-type]
        failed = parent.failure()
        assert message in failed.message
        assert failed.process == "core"
        assert "Traceback" in failed.traceback
        assert parent.core.wait(BOUND_S)
        assert parent.core.exit_code() == 1
        assert not parent.runtime_dir.exists()


def test_start_fails_with_the_workers_own_words(tmp_path: pathlib.Path) -> None:
    model_dir = make_model_dir(tmp_path, Script(fail="tensor x is missing"))
    with FakeParent() as parent:
        parent.configure(EngineConfig(model=str(model_dir)))
        failed = parent.failure()
        assert (failed.process, failed.error_type, failed.message) == ("worker-0", "ModelError", "tensor x is missing")


def test_start_fails_where_the_worker_ends_without_a_word(tmp_path: pathlib.Path) -> None:
    with FakeParent(worker_module="tests.fakes.no_such_module") as parent:
        parent.configure(EngineConfig(model=str(make_model_dir(tmp_path, Script()))))
        failed = parent.failure()
        assert failed.error_type == "EngineStartError"
        assert "worker-0" in failed.message
        assert "ended with exit code 1 before it was ready" in failed.message


# ---- requests --------------------------------------------------------------------------------------------------------


def test_streamed_and_whole_answers_are_the_same(frontend: FakeFrontend) -> None:
    prompt = list(range(30))
    frontend.add(make_request(1, prompt, 20, stream=True), make_request(2, prompt, 20))
    assert frontend.output(1) == frontend.output(2) == expected_output(prompt, 20, GREEDY)
    assert len(frontend.tokens[1]) == 20
    assert not frontend.tokens[2]
    assert {frontend.finished[number].finish_reason for number in (1, 2)} == {"length"}
    assert is_empty(frontend.stats())


def test_n_answers_share_the_prompt_and_differ(frontend: FakeFrontend) -> None:
    prompt = list(range(100, 118))
    frontend.add(make_request(5, prompt, 12, n=4, sampling=SamplingRow(temperature=1.0, seed=7)))
    for index in range(4):
        row = SamplingRow(temperature=1.0, seed=7, sample_index=index)
        assert frontend.output(5 + index) == expected_output(prompt, 12, row)
    assert sum(frontend.finished[5 + index].num_cached_tokens for index in range(4)) == 3 * 17
    assert is_empty(frontend.stats())


def test_stop_token_ends_an_answer_and_is_part_of_it(frontend: FakeFrontend) -> None:
    whole = expected_output([9, 8, 7], 20, GREEDY)
    sampling = SamplingRow(stop_token_ids=int32_bytes([whole[6]]))
    frontend.add(make_request(0, [9, 8, 7], 20, sampling=sampling))
    assert frontend.output(0) == whole[: whole.index(whole[6]) + 1]
    assert frontend.finished[0].finish_reason == "stop"
    assert frontend.finished[0].stop_token_id == whole[6]


def test_max_tokens_0_ends_at_once(frontend: FakeFrontend) -> None:
    frontend.add(make_request(3, [1, 2], 0, n=2))
    assert frontend.output(3) == frontend.output(4) == []
    assert frontend.finished[4].finish_reason == "length"


def test_abort_frees_everything_and_says_nothing_more(frontend: FakeFrontend) -> None:
    frontend.add(make_request(1, [1, 2, 3], 900, stream=True), make_request(2, [4, 5], 10))
    while not frontend.tokens[1]:
        frontend.receive()
    frontend.abort(1, 1, 77)  # twice and unknown: passed over
    assert frontend.output(2) == expected_output([4, 5], 10, GREEDY)
    assert is_empty(frontend.stats())
    assert 1 not in frontend.finished
    frontend.add(make_request(1, [1, 2, 3], 4))
    assert frontend.output(1)[-4:] == expected_output([1, 2, 3], 4, GREEDY)


def test_L22_a_frontend_that_vanishes_leaves_nothing(core: FakeParent, frontend: FakeFrontend) -> None:
    with FakeFrontend(core.endpoint) as other:
        other.add(*(make_request(number, [number + 1], 900, stream=True) for number in range(20)))
        while not other.tokens[19]:
            other.receive()
        assert frontend.stats().num_frontends >= 2
    wait_until_empty(frontend)


def test_L23_two_frontends_use_the_same_numbers_and_ids(core: FakeParent, frontend: FakeFrontend) -> None:
    with FakeFrontend(core.endpoint) as other:
        for peer, first in ((frontend, 1), (other, 501)):
            peer.add(*(make_request(i, [first + i], 60, stream=i % 2 == 0, request_id="same") for i in range(8)))
        frontend.abort(7)
        for peer, first in ((frontend, 1), (other, 501)):
            for i in range(7):
                assert peer.output(i) == expected_output([first + i], 60, GREEDY)
        assert other.output(7) == expected_output([508], 60, GREEDY)
    assert 7 not in frontend.finished
    wait_until_empty(frontend)


def test_L37_1500_requests_at_once_over_one_connection(frontend: FakeFrontend) -> None:
    frontend.add(*(make_request(number, [number % 900, 5], 3) for number in range(1500)))
    for number in range(1500):
        assert frontend.output(number) == expected_output([number % 900, 5], 3, GREEDY)
    assert is_empty(frontend.stats())


def test_L21_preempted_answers_are_whole(tmp_path: pathlib.Path) -> None:
    options: dict[str, object] = {"block_size": 16, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    with one_frontend(tmp_path, Script(num_blocks=11), **options) as frontend:
        prompts = [[10 + i] * 60 for i in range(2)]
        frontend.add(*(make_request(i, prompt, 60, stream=True) for i, prompt in enumerate(prompts)))
        for i, prompt in enumerate(prompts):
            assert frontend.output(i) == expected_output(prompt, 60, GREEDY)
        stats = wait_until_empty(frontend)
        assert stats.num_preemptions_total <= 4


@pytest.mark.parametrize("depth", [1, 2])
def test_both_pipeline_depths_give_the_same(tmp_path: pathlib.Path, depth: int) -> None:
    with one_frontend(tmp_path, Script(num_blocks=40), pipeline_depth=depth, max_num_seqs=8) as frontend:
        frontend.add(*(make_request(i, [i, i + 1], 10 + i, n=2) for i in range(0, 24, 2)))
        for i in range(0, 24, 2):
            for index in range(2):
                row = SamplingRow(sample_index=index)
                assert frontend.output(i + index) == expected_output([i, i + 1], 10 + i, row)
        assert is_empty(frontend.stats())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "others", "field"),
    [
        ([], {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([1, VOCAB_SIZE], {}, "prompt_token_ids"),
        ([1] * 1024, {}, "prompt_token_ids"),
        ([1], {"n": 0}, "n"),
        ([1], {"sampling": SamplingRow(temperature=float("nan"))}, "temperature"),
        ([1], {"sampling": SamplingRow(top_p=0.0)}, "top_p"),
        ([1], {"sampling": SamplingRow(stop_token_ids=int32_bytes([VOCAB_SIZE]))}, "stop_token_ids"),
        ([1], {"sampling": SamplingRow(stop_token_ids=b"abc")}, "stop_token_ids"),
    ],
)
def test_L12_invalid_requests_are_refused_and_name_the_field(
    frontend: FakeFrontend, prompt: list[int], others: dict[str, object], field: str
) -> None:
    frontend.add(make_request(1, [3], 20, stream=True), make_request(2, prompt, 5, **others))
    frontend.wait_for(2)
    assert (frontend.rejected[2].kind, frontend.rejected[2].field) == ("invalid", field)
    assert frontend.output(1) == expected_output([3], 20, GREEDY)


def test_L17_prompts_around_the_models_length(frontend: FakeFrontend) -> None:
    frontend.add(*(make_request(length, [1] * length, 5) for length in (1023, 1024, 1025)))
    frontend.wait_for(1023, 1024, 1025)
    assert frontend.output(1023) == expected_output([1] * 1023, 1, GREEDY)
    for length in (1024, 1025):
        assert str(length) in frontend.rejected[length].message
        assert "max_model_len) is 1024" in frontend.rejected[length].message


def test_number_in_use_is_refused(frontend: FakeFrontend) -> None:
    frontend.add(make_request(1, [3], 900, n=2), make_request(2, [3], 5))
    frontend.wait_for(2)
    assert frontend.rejected[2].field == "number"
    frontend.abort(1, 2)


def test_L20_what_can_never_fit_is_refused_and_blocks_nobody(tmp_path: pathlib.Path) -> None:
    with one_frontend(tmp_path, Script(num_blocks=33)) as frontend:  # a pool of 128 tokens
        frontend.add(make_request(1, [1] * 200, 5), make_request(2, [2] * 10, 5), make_request(3, [3] * 100, 100))
        assert frontend.output(2) == expected_output([2] * 10, 5, GREEDY)
        assert "200 tokens" in frontend.rejected[1].message
        assert "128" in frontend.rejected[1].message
        answer = frontend.output(3)
        assert answer == expected_output([3] * 100, len(answer), GREEDY)
        assert frontend.finished[3].finish_reason == "length"
        assert len(answer) == 29
        assert frontend.finished[3].num_preemptions == 0


def test_the_queue_is_bounded_in_requests(tmp_path: pathlib.Path) -> None:
    with one_frontend(tmp_path, Script(), max_num_seqs=1, max_num_queued_reqs=2) as frontend:
        frontend.add(*(make_request(number, [1], 50) for number in range(5)))
        frontend.wait_for(*range(5))
        assert sorted(frontend.rejected) == [3, 4]
        assert frontend.rejected[3].kind == "queue_full"
        assert 1 <= frontend.rejected[3].retry_after_s <= 60
        assert sorted(frontend.finished) == [0, 1, 2]


def test_the_queue_is_bounded_in_tokens(tmp_path: pathlib.Path) -> None:
    with one_frontend(tmp_path, Script(), max_num_seqs=1, max_num_queued_tokens=30) as frontend:
        frontend.add(*(make_request(number, [1] * 20, 50) for number in range(4)))
        frontend.wait_for(*range(4))
        assert frontend.rejected[3].kind == "queue_full"
        assert "30 tokens" in frontend.rejected[3].message
