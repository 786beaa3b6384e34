"""ModelRunner: what must hold token for token in float32, however steps are cut, ordered and shared."""

import pathlib

import pytest
import torch

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import SamplingRow, SchedulerOutput
from folovllm.worker_proc.attention.backend import AttentionStep
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes import tiny_models
from tests.fakes.fake_core import int32, ints, new_request
from tests.fakes.runner_driver import Driver, load_model, make_runner

LIMITS = StepLimits(
    num_slots=5,
    max_model_len=96,
    max_num_batched_tokens=128,
    num_blocks=120,
    block_size=4,
    vocab_size=tiny_models.VOCAB_SIZE,
    num_valid_token_ids=tiny_models.VOCAB_SIZE,
)
PROMPTS = ([7], [3, 5, 7, 11, 13], list(range(40, 61)), list(range(100, 137)))
NUM_OUTPUT = 12
SEEDED = SamplingRow(temperature=0.9, top_p=0.95, top_k=60, seed=-7 & (2**64 - 1), sample_index=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> CausalLM:
    return load_model(folder, LIMITS.max_model_len)


@pytest.fixture
def driver(model: CausalLM, folder: pathlib.Path) -> Driver:
    return Driver(make_runner(model, folder, LIMITS), LIMITS)


@pytest.fixture(scope="module")
def alone(model: CausalLM, folder: pathlib.Path) -> list[list[int]]:
    """Greedy tokens of each prompt, each run by itself."""
    drivers = [Driver(make_runner(model, folder, LIMITS), LIMITS) for _ in PROMPTS]
    outputs = []
    for one, prompt in zip(drivers, PROMPTS, strict=True):
        one.join(0, prompt)
        outputs.append(one.finish(0, NUM_OUTPUT)[:NUM_OUTPUT])
    return outputs


def run_together(driver: Driver, num_output: int = NUM_OUTPUT) -> list[list[int]]:
    """All requests of the driver in every step, until each has enough."""
    requests = list(driver.requests.values())
    while any(len(request.output) < num_output for request in requests):
        driver.step({slot: request.num_known - request.num_computed for slot, request in driver.requests.items()})
    return [request.output[:num_output] for request in requests]


def test_greedy_tokens_are_those_of_transformers(folder: pathlib.Path, alone: list[list[int]]) -> None:
    reference = tiny_models.load_reference(folder)
    for prompt, output in zip(PROMPTS, alone, strict=True):
        ids = torch.tensor([prompt])
        made = reference.generate(ids, max_new_tokens=NUM_OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output == made[0, len(prompt) :].tolist()


def test_together_as_alone(driver: Driver, alone: list[list[int]]) -> None:
    for slot, prompt in enumerate(PROMPTS):
        driver.join(slot, prompt)
    assert run_together(driver) == alone


def test_the_reference_backend_gives_the_same(model: CausalLM, folder: pathlib.Path, alone: list[list[int]]) -> None:
    driver = Driver(make_runner(model, folder, LIMITS, backend=TorchNaiveBackend()), LIMITS)
    for slot, prompt in enumerate(PROMPTS):
        driver.join(slot, prompt)
    assert run_together(driver) == alone


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_chunked_as_whole_beside_others(chunk: int, driver: Driver, alone: list[list[int]]) -> None:
    """The long prompt comes in chunks while another request decodes and a third joins in between."""
    long, first, late = driver.join(3, PROMPTS[3]), driver.join(1, PROMPTS[1]), None
    while len(long.output) < NUM_OUTPUT or len(first.output) < NUM_OUTPUT:
        if late is None and first.output:
            late = driver.join(2, PROMPTS[2])
        missing = {slot: request.num_known - request.num_computed for slot, request in driver.requests.items()}
        output = driver.step({slot: min(count, chunk) for slot, count in missing.items()})
        sampling = sum(count <= chunk for count in missing.values())
        assert len(ints(output.token_ids)) == sampling, "a chunk that is not the last samples nothing"
    assert late is not None
    assert [first.output[:NUM_OUTPUT], long.output[:NUM_OUTPUT]] == [alone[1], alone[3]]
    assert len(late.output) > 1
    assert late.output[:NUM_OUTPUT] == alone[2][: len(late.output)]


def test_steps_submitted_ahead_give_the_same(driver: Driver, alone: list[list[int]]) -> None:
    """Depth 2: a step is executed before the tokens of the one before were read."""
    requests = [driver.join(slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    driver.submit({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    for _ in range(NUM_OUTPUT - 1):
        driver.submit(dict.fromkeys(range(len(PROMPTS)), 1))
        driver.collect()
    driver.collect()
    assert [request.output for request in requests] == alone


def test_a_slot_is_used_again_without_a_trace(driver: Driver, alone: list[list[int]]) -> None:
    driver.join(0, PROMPTS[3], SEEDED)
    driver.finish(0, 20)
    for index in (2, 0, 3, 1):
        driver.join(0, PROMPTS[index])
        assert driver.finish(0, NUM_OUTPUT) == alone[index]


def test_the_same_slots_with_new_requests_are_not_taken_for_the_old(driver: Driver, alone: list[list[int]]) -> None:
    """One-token prompts: the step's bytes are those of the decode step before."""
    driver.join(0, PROMPTS[0], SEEDED)
    driver.finish(0, 3)
    driver.join(0, PROMPTS[0])
    assert driver.finish(0, NUM_OUTPUT) == alone[0]


def test_l09_a_request_that_comes_back_goes_on_as_it_would_have(driver: Driver) -> None:
    driver.join(0, PROMPTS[2], SEEDED)
    undisturbed = driver.finish(0, NUM_OUTPUT)
    for cut in (1, 5, 11):
        driver.join(3, [*PROMPTS[2], *undisturbed[:cut]], SEEDED, num_prompt=len(PROMPTS[2]))
        assert driver.finish(3, NUM_OUTPUT) == undisturbed


def test_l09_seeded_requests_do_not_depend_on_their_neighbours(driver: Driver) -> None:
    driver.join(0, PROMPTS[1], SEEDED)
    by_itself = driver.finish(0, NUM_OUTPUT)
    driver.leave(0)
    for slot, prompt in enumerate(PROMPTS):
        driver.join(slot, prompt, SamplingRow(temperature=1.5, seed=slot))
    beside = driver.join(4, PROMPTS[1], SEEDED)
    run_together(driver)
    assert beside.output[:NUM_OUTPUT] == by_itself


def test_l09_answers_of_one_request_differ(driver: Driver) -> None:
    for index in range(4):
        driver.join(index, PROMPTS[1], SamplingRow(temperature=1.0, seed=5, sample_index=index))
    outputs = run_together(driver)
    assert len({tuple(output) for output in outputs}) == 4


def test_a_fork_copies_the_block_it_writes_to(model: CausalLM, folder: pathlib.Path, alone: list[list[int]]) -> None:
    """Slot 0 has computed 5 tokens, blocks 1 and 2; slot 1 shares block 1 and has a copy of block 2, block 9."""
    runner = make_runner(model, folder, LIMITS)
    prompt = PROMPTS[1]
    first = runner.execute(SchedulerOutput(0, int32([0]), int32([5]), [new_request(0, prompt, [1, 2, 3, 4, 5])]))
    tokens = [ints(first.wait().token_ids)]
    fork = new_request(1, [*prompt, 17], [1, 9, 6, 7, 8], num_prompt_tokens=5, num_computed_tokens=5)
    step = SchedulerOutput(1, int32([0, 1]), new_requests=[fork], block_copies=int32([2, 9]))
    tokens.append(ints(runner.execute(step).wait().token_ids))
    for step_id in range(2, NUM_OUTPUT):
        tokens.append(ints(runner.execute(SchedulerOutput(step_id, int32([0, 1]))).wait().token_ids))
    assert [row[0] for row in tokens] == alone[1], "the fork's writes must not reach the shared block"
    other = Driver(make_runner(model, folder, LIMITS), LIMITS)
    other.join(0, [*prompt, 17])
    assert [row[1] for row in tokens[1:]] == other.finish(0, NUM_OUTPUT - 1)


def test_cached_prefix_as_cold(model: CausalLM, folder: pathlib.Path, alone: list[list[int]]) -> None:
    """Another slot takes over the first four blocks of a prompt and computes the rest."""
    runner = make_runner(model, folder, LIMITS)
    prompt = PROMPTS[2]
    runner.execute(SchedulerOutput(0, int32([0]), int32([21]), [new_request(0, prompt, list(range(1, 10)))]))
    shared = new_request(1, prompt, [1, 2, 3, 4, 20, 21, 22, 23, 24], num_computed_tokens=16)
    outputs = [runner.execute(SchedulerOutput(1, int32([1]), int32([5]), [shared])).wait()]
    outputs += [runner.execute(SchedulerOutput(i, int32([1]))).wait() for i in range(2, NUM_OUTPUT + 1)]
    assert [token for output in outputs for token in ints(output.token_ids)] == alone[2]


def test_l07_the_stop_set_is_masked_before_min_tokens(driver: Driver, alone: list[list[int]]) -> None:
    """The first greedy tokens are made the stop set; none may come before the sixth token, beside a request without."""
    stops = sorted(set(alone[2][:3]))
    limited = driver.join(0, PROMPTS[2], SamplingRow(min_tokens=5, stop_token_ids=int32(stops)))
    free = driver.join(1, PROMPTS[2])
    run_together(driver)
    assert not set(limited.output[:5]) & set(stops)
    assert free.output[:NUM_OUTPUT] == alone[2]
    resumed = driver.join(0, PROMPTS[2], SamplingRow(min_tokens=0, stop_token_ids=int32(stops)))
    driver.finish(0, 3)
    assert resumed.output == alone[2][:3]


def test_rows_left_without_a_token_are_told(driver: Driver, model: CausalLM, folder: pathlib.Path) -> None:
    driver = Driver(make_runner(model, folder, LIMITS, num_valid_token_ids=4), LIMITS)
    driver.join(0, PROMPTS[1])
    driver.join(1, PROMPTS[1], SamplingRow(min_tokens=2, stop_token_ids=int32([0, 1, 2, 3, 10_000])))
    driver.join(2, PROMPTS[1])
    output = driver.step({0: 5, 1: 5, 2: 5})
    assert ints(output.no_token_rows) == [1]


def test_l10_ids_that_the_tokenizer_does_not_know_are_never_sampled(model: CausalLM, folder: pathlib.Path) -> None:
    driver = Driver(make_runner(model, folder, LIMITS, num_valid_token_ids=23), LIMITS)
    driver.join(0, PROMPTS[1], SamplingRow(temperature=2.0, seed=3))
    driver.join(1, PROMPTS[2])
    driver.join(2, PROMPTS[2], SamplingRow(temperature=2.0, top_p=0.99, seed=4))
    assert all(token < 23 for output in run_together(driver, 30) for token in output)


def test_a_step_without_a_last_token_has_no_tokens(driver: Driver) -> None:
    driver.join(0, PROMPTS[3])
    assert driver.step({0: 8}).token_ids == b""


class FailingModel:
    """Fails in the steps it is told to; else the model it wraps."""

    def __init__(self, model: CausalLM) -> None:
        self.fails = False
        self._model = model
        self.compute_logits = model.compute_logits
        self.checkpoint_tensors = model.checkpoint_tensors
        self.parts = model.parts
        self.spare_tensors = model.spare_tensors
        self.finish_loading = model.finish_loading

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("out of luck")
        return self._model.forward(input_ids, positions, attention)


def test_a_failed_step_spoils_neither_others_nor_steps_already_sent(
    model: CausalLM, folder: pathlib.Path, alone: list[list[int]]
) -> None:
    failing = FailingModel(model)
    runner = make_runner(failing, folder, LIMITS)
    healthy = [int32([1]), int32([1])]
    tokens = []
    step = SchedulerOutput(0, int32([1]), int32([5]), [new_request(1, PROMPTS[1], list(range(1, 10)))])
    tokens += ints(runner.execute(step).wait().token_ids)
    failing.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        runner.execute(SchedulerOutput(1, int32([0]), int32([5]), [new_request(0, PROMPTS[1], list(range(10, 20)))]))
    failing.fails = False
    # Sent before the failure was known: slot 0 is to go on. Its token is void, slot 1's is right.
    both = ints(runner.execute(SchedulerOutput(2, int32([0, 1]))).wait().token_ids)
    assert len(both) == 2
    tokens.append(both[1])
    for step_id, slots in enumerate(healthy, start=3):
        tokens += ints(runner.execute(SchedulerOutput(step_id, slots)).wait().token_ids)
    assert tokens == alone[1][:4]


def test_a_refused_step_changes_nothing(model: CausalLM, folder: pathlib.Path, alone: list[list[int]]) -> None:
    runner = make_runner(model, folder, LIMITS)
    new = [new_request(0, PROMPTS[1], list(range(1, 10)))]
    tokens = ints(runner.execute(SchedulerOutput(0, int32([0]), int32([5]), new)).wait().token_ids)
    overwrites = [new_request(0, [1, 2], [3])]
    with pytest.raises(ProtocolError, match="slots: 9 is out of range"):
        runner.execute(SchedulerOutput(1, int32([0, 9]), new_requests=overwrites, block_copies=int32([3, 1])))
    tokens += ints(runner.execute(SchedulerOutput(2, int32([0]))).wait().token_ids)
    assert tokens == alone[1][:2]


def test_a_request_may_fill_the_whole_model_length(driver: Driver) -> None:
    driver.join(0, [5] * (LIMITS.max_model_len - 1))
    output = driver.step({0: LIMITS.max_model_len - 1})
    assert len(ints(output.token_ids)) == 1
    with pytest.raises(ProtocolError, match="no room for one more token"):
        driver.submit({0: 1})


def test_logits_that_forbid_are_minus_infinity(model: CausalLM, folder: pathlib.Path) -> None:
    """A sampled row with a forbidden set draws from the rest even at a high temperature."""
    driver = Driver(make_runner(model, folder, LIMITS, num_valid_token_ids=3), LIMITS)
    driver.join(0, [1, 2], SamplingRow(temperature=100.0, seed=1, min_tokens=20, stop_token_ids=int32([0, 2])))
    assert driver.finish(0, 20) == [1] * 20
