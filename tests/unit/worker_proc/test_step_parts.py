"""A step that memory does not suffice for is computed in parts, with the same results."""

import logging
import pathlib
from collections import deque

import numpy as np
import pytest
import torch

from folovllm.common.errors import EngineError
from folovllm.common.messages.core_worker import Logprobs, ModelRunnerOutput, PromptLogprobs, SamplingRow
from folovllm.common.messages.core_worker import SchedulerOutput as Step
from folovllm.worker_proc.attention.backend import AttentionStep
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.step_arrays import SlotCounts, StepArrays, StepLimits, read_step
from folovllm.worker_proc.step_parts import JoinedOutput, StepPart, StepsInParts, split_step
from folovllm.worker_proc.worker import Answer, execute
from tests.fakes import tiny_models
from tests.fakes.fake_core import int32, ints, new_request
from tests.fakes.runner_driver import Driver, load_model, make_runner
from tests.fakes.simulated_logprobs import unpack

LIMITS = StepLimits(
    num_slots=40,
    max_model_len=200,
    max_num_batched_tokens=400,
    num_blocks=700,
    block_size=4,
    vocab_size=tiny_models.VOCAB_SIZE,
    num_valid_token_ids=tiny_models.VOCAB_SIZE,
)
LENGTHS = (1, 5, 1, 70, 16, 33, 9)
PROMPTS = [[(7 * row + 3 * place) % 190 for place in range(length)] for row, length in enumerate(LENGTHS)]
SAMPLING = [
    SamplingRow(),
    SamplingRow(logprobs=2, prompt_logprobs=1),
    SamplingRow(temperature=0.8, seed=5),
    SamplingRow(prompt_logprobs=2),
    SamplingRow(repetition_penalty=1.3, logprobs=0),
    SamplingRow(temperature=1.0, top_p=0.9, seed=9, logprobs=1, prompt_logprobs=0),
    SamplingRow(min_tokens=3, stop_token_ids=int32([1, 2])),
]


class ScarceModel:
    """A model on a device with room for so many tokens, and logits of so many rows."""

    def __init__(self, model: CausalLM) -> None:
        self.most_tokens = self.most_rows = LIMITS.max_num_batched_tokens
        self.num_tokens: list[int] = []  # of each forward pass that had room
        self._model = model
        self.checkpoint_tensors = model.checkpoint_tensors
        self.parts = model.parts
        self.spare_tensors = model.spare_tensors
        self.finish_loading = model.finish_loading

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        hidden = self._model.forward(input_ids, positions, attention)  # what fails has written to the cache already
        if len(input_ids) > self.most_tokens:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        self.num_tokens.append(len(input_ids))
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > self.most_rows:
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")
        return self._model.compute_logits(hidden)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> CausalLM:
    return load_model(folder, LIMITS.max_model_len)


@pytest.fixture
def scarce(model: CausalLM) -> ScarceModel:
    return ScarceModel(model)


@pytest.fixture
def driver(scarce: ScarceModel, folder: pathlib.Path) -> Driver:
    return Driver(make_runner(scarce, folder, LIMITS), LIMITS)


def joined(driver: Driver) -> Driver:
    for slot, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLING, strict=True)):
        driver.join(slot, prompt, sampling)
    return driver


def run(driver: Driver, num_steps: int) -> list[ModelRunnerOutput]:
    """Prompts in one step, then decodes."""
    outputs = [driver.step({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})]
    return outputs + [driver.step(dict.fromkeys(range(len(PROMPTS)), 1)) for _ in range(num_steps - 1)]


@pytest.fixture(scope="module")
def whole(model: CausalLM, folder: pathlib.Path) -> list[ModelRunnerOutput]:
    return run(joined(Driver(make_runner(model, folder, LIMITS), LIMITS)), 4)


def assert_same_places(found: Logprobs | None, expected: Logprobs | None) -> None:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    for place, other in zip(unpack(found), unpack(expected), strict=True):
        assert [token for token, _ in place[0]] == [token for token, _ in other[0]] and place[1] == other[1]
        assert [value for _, value in place[0]] == pytest.approx([value for _, value in other[0]], abs=1e-4)


@pytest.mark.parametrize(("most_tokens", "num_parts"), [(100, 2), (40, 4), (17, 8)])
def test_in_parts_as_whole(
    most_tokens: int, num_parts: int, driver: Driver, scarce: ScarceModel, whole: list[ModelRunnerOutput]
) -> None:
    """Tokens, log probabilities of tokens and of prompts, which a part may cut anywhere."""
    joined(driver)
    scarce.most_tokens = most_tokens
    outputs = run(driver, 4)
    assert len(scarce.num_tokens) == num_parts + 3 and max(scarce.num_tokens) <= most_tokens
    for output, expected in zip(outputs, whole, strict=True):
        assert output.token_ids == expected.token_ids and output.logprob_rows == expected.logprob_rows
        assert_same_places(output.logprobs, expected.logprobs)
        for part, other in zip(output.prompt_logprobs, expected.prompt_logprobs, strict=True):
            assert (part.row, part.start) == (other.row, other.start)
            assert_same_places(part.logprobs, other.logprobs)


def test_too_many_rows_of_logits_are_as_much_a_reason(driver: Driver, scarce: ScarceModel) -> None:
    for slot in range(40):
        driver.join(slot, [slot, 3 * slot])
    expected = driver.step(dict.fromkeys(range(40), 2)).token_ids
    scarce.most_rows = 17
    for slot in range(40):
        driver.join(slot, [slot, 3 * slot])
    output = driver.step(dict.fromkeys(range(40), 2))
    assert output.token_ids == expected and output.max_num_tokens == 20
    output = driver.step(dict.fromkeys(range(40), 1))
    assert len(ints(output.token_ids)) == 40 and output.max_num_tokens == 16, "20 decodes have 20 rows"


def test_the_bound_is_told_and_kept_and_logged_once(
    driver: Driver, scarce: ScarceModel, caplog: pytest.LogCaptureFixture
) -> None:
    scarce.most_tokens = 60
    driver.join(0, PROMPTS[3])
    with caplog.at_level(logging.WARNING):
        assert driver.step({0: 70}).max_num_tokens == 35
        assert driver.step({0: 1}).max_num_tokens == 0
        driver.join(1, PROMPTS[3])
        assert driver.step({1: 70}).max_num_tokens == 35
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no memory left for a step of 70 tokens (Tried to allocate 2.00 GiB)"
    ]
    assert scarce.num_tokens == [35, 35, 1, 35, 35]


def test_steps_that_were_sent_ahead_are_divided_too(
    driver: Driver, scarce: ScarceModel, whole: list[ModelRunnerOutput]
) -> None:
    joined(driver)
    scarce.most_tokens = 20
    driver.submit({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    for _ in range(3):
        driver.submit(dict.fromkeys(range(len(PROMPTS)), 1))
    assert [driver.collect().token_ids for _ in range(4)] == [output.token_ids for output in whole]


def test_at_the_floor_the_step_fails_and_the_next_ones_go_on(
    driver: Driver, scarce: ScarceModel, whole: list[ModelRunnerOutput]
) -> None:
    """A step that was sent before finds the counts it was made for; the worker serves who comes later."""
    joined(driver)
    scarce.most_tokens = 15
    with pytest.raises(EngineError, match=r"no memory left for a step of 16 tokens \(Tried to allocate 2.00 GiB\)"):
        driver.submit({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    answer = execute(driver.runner, Step(1, int32([0, 1, 2, 3, 5, 6]))).wait()
    assert answer.error == "" and len(ints(answer.token_ids)) == 6
    scarce.most_tokens = 100
    assert [output.token_ids for output in run(joined(driver), 4)] == [output.token_ids for output in whole]


def test_masks_go_with_the_token_that_is_sampled_under_them(
    driver: Driver, scarce: ScarceModel, whole: list[ModelRunnerOutput]
) -> None:
    """Slots 3 and 5 are cut; each may choose one token only."""
    scarce.most_tokens = 40
    forced = {5: 11, 1: 12, 3: 13}
    masks = np.zeros((3, LIMITS.mask_words), "<u4")
    for row, token in enumerate(forced.values()):
        masks[row, token // 32] = 1 << token % 32
    order = sorted(range(len(PROMPTS)), key=lambda slot: LENGTHS[slot] > 1)
    new, first = [], 1
    for slot in order:
        new.append(new_request(slot, PROMPTS[slot], list(range(first, first + LENGTHS[slot] // 4 + 2)), SAMPLING[slot]))
        first += LENGTHS[slot] // 4 + 2
    chunks = int32(LENGTHS[slot] for slot in order if LENGTHS[slot] > 1)
    step = Step(0, int32(order), chunks, new, masked_slots=int32(forced), token_masks=masks.tobytes())
    tokens = ints(driver.runner.execute(step).wait().token_ids)
    expected = ints(whole[0].token_ids)
    assert tokens == [forced.get(slot, expected[row]) for row, slot in enumerate(order)]


# ---- parts alone -----------------------------------------------------------------------------------------------------


def arrays_of(lengths: list[int]) -> StepArrays:
    """A step of whole prompts in the slots 0, 1, …; those of one token come first."""
    new = [new_request(slot, [1] * length, list(range(1, 51))) for slot, length in enumerate(lengths)]
    chunks = [length for length in lengths if length > 1]
    step = Step(0, int32(range(len(lengths))), int32(chunks), new)
    return read_step(step, SlotCounts.empty(LIMITS.num_slots), LIMITS)


def test_parts_hold_every_token_once_and_in_order() -> None:
    lengths = [1, 1, 1, 5, 2, 30, 3]
    for most in (1, 2, 4, 16, 100):
        parts = list(split_step(StepPart(arrays_of(lengths), 0), most))
        tokens = [
            slot
            for part in parts
            for slot, count in zip(part.arrays.slots, part.arrays.query_lens, strict=True)
            for _ in range(count)
        ]
        assert tokens == [slot for slot, length in enumerate(lengths) for _ in range(length)]
        assert all(part.num_tokens == most for part in parts[:-1]) and parts[-1].num_tokens <= most
        assert all(part.first_row == part.arrays.slots[0] for part in parts)
        assert sum(part.arrays.num_decodes for part in parts) == 3
    assert [part.arrays.slots.tolist() for part in split_step(StepPart(arrays_of(lengths), 0), 16)] == [
        [0, 1, 2, 3, 4, 5],
        [5],
        [5, 6],
    ]


def test_parts_of_parts_know_their_rows() -> None:
    (_, second) = split_step(StepPart(arrays_of([1, 1, 1, 1]), 0), 2)
    assert [part.first_row for part in split_step(second, 1)] == [2, 3]


def test_a_part_is_no_other_step() -> None:
    """Whoever remembers a step by its key does not take a last token of a chunk for a decode."""
    parts = list(split_step(StepPart(arrays_of([1, 3]), 0), 1))
    assert parts[1].arrays.key == parts[2].arrays.key != arrays_of([1, 1]).key
    assert [part.arrays.num_decodes for part in parts] == [1, 0, 0, 0]


class Script:
    """Computes steps as it is told: "memory", an error, or a result; and who was skipped."""

    def __init__(self, *events: str) -> None:
        self.events = deque(events)
        self.computed: list[int] = []
        self.skipped: list[int] = []

    def compute(self, step_id: int, arrays: StepArrays) -> Answer:
        event = self.events.popleft() if self.events else ""
        if event == "memory":
            raise torch.OutOfMemoryError("no room")
        num_tokens = int(arrays.query_lens.sum())
        self.computed.append(num_tokens)
        if event:
            raise RuntimeError(event)
        return Answer(ModelRunnerOutput(step_id, int32([0] * len(arrays.slots))))

    def skip(self, arrays: StepArrays) -> None:
        self.skipped.append(int(arrays.query_lens.sum()))


def test_another_error_in_a_part_ends_the_step_and_the_rest_is_counted() -> None:
    script = Script("memory", "", "memory", "out of luck")
    steps = StepsInParts(script.compute, script.skip, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of luck"):
        steps.run(0, arrays_of([128]))
    assert (script.computed, script.skipped) == ([64, 32], [32])


def test_an_error_at_once_is_left_alone() -> None:
    script = Script("out of luck")
    steps = StepsInParts(script.compute, script.skip, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of luck"):
        steps.run(0, arrays_of([128]))
    assert script.skipped == []
    assert steps.run(1, arrays_of([128])).wait().max_num_tokens == 0


def test_the_bound_stops_at_the_floor() -> None:
    script = Script(*["memory"] * 3)
    steps = StepsInParts(script.compute, script.skip, torch.device("cpu"))
    assert steps.run(0, arrays_of([150])).wait().max_num_tokens == 19
    script.events.extend(["memory"])
    assert steps.run(1, arrays_of([17])).wait().max_num_tokens == 16
    script.events.extend(["", "memory"])
    with pytest.raises(EngineError, match="no memory left for a step of 16 tokens"):
        steps.run(2, arrays_of([40]))
    assert script.skipped == [16, 8]


def test_rows_of_parts_are_joined_as_rows_of_the_step() -> None:
    def logprobs(*tokens: int) -> Logprobs:
        ones = int32([1] * len(tokens))
        return Logprobs(ones, int32(tokens), np.array(tokens, "<f4").tobytes(), ones)

    first = ModelRunnerOutput(
        7, int32([4, 5]), int32([1]), "", int32([0]), logprobs(4), [PromptLogprobs(2, 1, logprobs(8, 9))]
    )
    middle = ModelRunnerOutput(7, prompt_logprobs=[PromptLogprobs(0, 3, logprobs(10))])
    last = ModelRunnerOutput(
        7,
        int32([6, 7]),
        int32([0]),
        "",
        int32([1]),
        logprobs(7),
        [PromptLogprobs(0, 4, logprobs(11)), PromptLogprobs(1, 1, logprobs(12))],
    )
    output = JoinedOutput([(first, 0), (middle, 2)], Answer(last), 2, 20).wait()
    assert (output.step_id, ints(output.token_ids), ints(output.no_token_rows)) == (7, [4, 5, 6, 7], [1, 2])
    assert (ints(output.logprob_rows), output.logprobs) == ([0, 3], logprobs(4, 7))
    assert output.prompt_logprobs == [PromptLogprobs(2, 1, logprobs(8, 9, 10, 11)), PromptLogprobs(3, 1, logprobs(12))]
    assert output.max_num_tokens == 20
