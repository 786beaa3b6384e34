"""This step's tensors against the same things counted one by one."""

import numpy as np
import pytest
import torch

from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.worker_proc.input_batch import InputBatch, InputBatchBuilder
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.constraints import MinTokens
from folovllm.worker_proc.sample.logprobs import PromptPart
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes.fake_core import int32, new_request

LIMITS = StepLimits(
    num_slots=6,
    max_model_len=40,
    max_num_batched_tokens=64,
    num_blocks=99,
    block_size=4,
    vocab_size=100,
    num_valid_token_ids=100,
)
FIRST = [5, 6, 7]
SECOND = list(range(20, 31))
SAMPLED = 42


class Steps:
    """Rows and builder, and steps that go through them without a model: whoever samples gets token 42."""

    def __init__(self) -> None:
        self.states = RequestStates(LIMITS, torch.device("cpu"))
        self.builder = InputBatchBuilder(self.states, {})
        self._step_id = 0

    def run(self, slots: list[int], lens: list[int], new: list[NewRequest] | None = None) -> InputBatch:
        arrays = self.states.apply(SchedulerOutput(self._step_id, int32(slots), int32(lens), new or []))
        self._step_id += 1
        batch = self.builder.build(arrays)
        index = batch.index
        self.states.advance(arrays, index.slots, index.query_lens, index.host_sampling_slots)
        tokens = torch.full_like(batch.next_positions, SAMPLED)
        self.states.record(index.sampling_slots, batch.next_positions, tokens)
        return batch


@pytest.fixture
def steps() -> Steps:
    return Steps()


def joined(steps: Steps) -> InputBatch:
    """Slot 4 has a prompt of 3 tokens in blocks 10, 11, slot 1 one of 11 tokens in blocks 20 to 23, of which 5 come."""
    new = [new_request(4, FIRST, [10, 11]), new_request(1, SECOND, [20, 21, 22, 23])]
    return steps.run([4, 1], [3, 5], new)


def test_prompts_lie_flat_one_after_another(steps: Steps) -> None:
    batch = joined(steps)
    assert batch.input_ids.tolist() == [5, 6, 7, 20, 21, 22, 23, 24]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    metadata = batch.metadata
    assert metadata.slot_mapping.tolist() == [40, 41, 42, 80, 81, 82, 83, 84]
    assert metadata.query_lens == [3, 5]
    assert metadata.seq_lens == metadata.seq_lens_device.tolist() == [3, 5]
    assert metadata.num_decodes == 0
    assert metadata.block_table.tolist() == [[10, 11], [20, 21]]


def test_only_who_computes_its_last_known_token_samples(steps: Steps) -> None:
    batch = joined(steps)
    hidden = torch.arange(8.0)[:, None]
    assert batch.num_sampling == 1
    assert batch.sampling_rows(hidden).flatten().tolist() == [2.0]
    assert batch.index.host_sampling_slots.tolist() == [4]
    assert batch.next_positions.tolist() == [3]


def test_a_mixed_step_takes_the_sampled_token_and_the_next_chunk(steps: Steps) -> None:
    joined(steps)
    batch = steps.run([4, 1], [6])
    assert batch.input_ids.tolist() == [SAMPLED, 25, 26, 27, 28, 29, 30]
    assert batch.positions.tolist() == [3, 5, 6, 7, 8, 9, 10]
    assert batch.metadata.slot_mapping.tolist() == [43, 85, 86, 87, 88, 89, 90]
    assert batch.metadata.num_decodes == 1
    assert batch.metadata.seq_lens == [4, 11]
    assert batch.sampling_rows(torch.arange(7.0)[:, None]).flatten().tolist() == [0.0, 6.0]
    assert batch.next_positions.tolist() == [4, 11]
    assert batch.sampling.position.tolist() == [1, 0], "which output token of its request it is"


def test_a_single_token_of_a_longer_prompt_samples_nothing(steps: Steps) -> None:
    joined(steps)
    batch = steps.run([1], [])
    assert batch.num_sampling == 0
    assert batch.input_ids.tolist() == [25]


def test_unchanged_decodes_keep_their_index_and_move_on(steps: Steps) -> None:
    joined(steps)
    steps.run([4, 1], [6])
    first, second = steps.run([4, 1], []), steps.run([4, 1], [])
    assert second.index is first.index
    assert first.index.all_sample
    hidden = torch.zeros(2, 8)
    assert first.sampling_rows(hidden) is hidden, "nothing to select"
    assert second.positions.tolist() == [position + 1 for position in first.positions.tolist()] == [5, 12]
    assert second.sampling.position.tolist() == [3, 2]
    assert second.metadata.seq_lens == [6, 13]


def test_another_order_or_set_of_slots_makes_a_new_index(steps: Steps) -> None:
    joined(steps)
    steps.run([4, 1], [6])
    both = steps.run([4, 1], [])
    swapped = steps.run([1, 4], [])
    assert swapped.index is not both.index
    assert swapped.positions.tolist() == [12, 5]
    assert steps.run([4], []).positions.tolist() == [6]


def test_the_same_slots_with_a_new_request_make_a_new_index(steps: Steps) -> None:
    steps.run([2], [], [new_request(2, [9], [30], SamplingRow(temperature=1.0, seed=1))])
    before = steps.run([2], [])
    after = steps.run([2], [], [new_request(2, [8], [31], SamplingRow())])
    assert after.index is not before.index
    assert before.sampling.plain_rows is not None
    assert after.sampling.plain_rows is None
    assert after.input_ids.tolist() == [8]


def test_a_prompt_that_comes_token_by_token_begins_to_sample_at_its_end(steps: Steps) -> None:
    """The same slots with the same counts, but who samples changes: the index must not be kept."""
    steps.run([0], [], [new_request(0, [1, 2, 3], [30])])
    assert [steps.run([0], []).num_sampling for _ in range(3)] == [0, 1, 1]


def test_sampling_parameters_are_those_of_the_rows_that_sample(steps: Steps) -> None:
    parameters = [
        SamplingRow(0.5, 7, 0.9, 0.1, 2**64 - 1, 3),
        SamplingRow(),
        SamplingRow(temperature=2.0, seed=5),
        SamplingRow(temperature=1.0, top_k=1),
    ]
    new = [new_request(slot, [1, 2], [30 + slot], row) for slot, row in enumerate(parameters)]
    new.append(new_request(4, [1, 2, 3], [50]))
    sampling = steps.run([0, 1, 2, 3, 4], [2] * 5, new).sampling
    assert sampling.temperature.tolist() == [0.5, 0.0, 2.0, 1.0]
    assert sampling.top_k.tolist() == [7, 0, 0, 1]
    assert sampling.top_p.tolist() == [0.9, 1.0, 1.0, 1.0]
    assert sampling.min_p.tolist() == pytest.approx([0.1, 0.0, 0.0, 0.0])
    assert sampling.seed.tolist() == [-1, 0, 5, 0]
    assert sampling.sample_index.tolist() == [3, 0, 0, 0]
    assert sampling.filtered_rows is not None
    assert sampling.plain_rows is not None
    assert (sampling.filtered_rows.tolist(), sampling.plain_rows.tolist()) == ([0], [2])
    dtypes = (sampling.temperature.dtype, sampling.top_p.dtype, sampling.min_p.dtype, sampling.seed.dtype)
    assert dtypes == (torch.float32, torch.float64, torch.float32, torch.int64)


def test_min_tokens_forbids_until_there_are_enough(steps: Steps) -> None:
    limited = SamplingRow(min_tokens=2, stop_token_ids=int32([3, 4]))
    new = [new_request(0, [1, 2], [30]), new_request(1, [1, 2, 9], [31, 32], limited, num_prompt_tokens=3)]
    logits = torch.zeros(2, 100)
    for step, forbids in enumerate((True, True, False)):
        batch = steps.run([0, 1], [2, 3], new) if step == 0 else steps.run([0, 1], [])
        assert bool(batch.constraints) == forbids
        if forbids:
            (constraint,) = batch.constraints
            assert isinstance(constraint, MinTokens)
            constraint.apply(changed := logits.clone())
            assert (changed == -torch.inf).nonzero().tolist() == [[1, 3], [1, 4]]


def test_output_counts_from_the_prompt_also_after_coming_back(steps: Steps) -> None:
    resumed = new_request(3, [1, 2, 3, 50, 51], [30, 31], SamplingRow(min_tokens=3), num_prompt_tokens=3)
    batch = steps.run([3], [5], [resumed])
    assert batch.sampling.position.tolist() == [2]
    assert len(batch.constraints) == 1, "two of three tokens are there"
    assert steps.run([3], []).constraints == []


def test_random_mixes_are_as_counted_one_by_one(steps: Steps) -> None:
    chance = np.random.default_rng(0)
    for _ in range(50):
        lens = chance.integers(1, 12, size=6).tolist()
        known = [length + int(chance.integers(0, 3)) for length in lens]
        tokens = [chance.integers(0, 100, size=count).tolist() for count in known]
        blocks = [chance.integers(1, 99, size=4).tolist() for _ in known]
        order = sorted(range(6), key=lambda slot: lens[slot] > 1)
        new = [new_request(slot, tokens[slot], blocks[slot]) for slot in range(6)]
        batch = steps.run(order, [lens[slot] for slot in order if lens[slot] > 1], new)
        flat = [(slot, position) for slot in order for position in range(lens[slot])]
        assert batch.input_ids.tolist() == [tokens[slot][position] for slot, position in flat]
        assert batch.positions.tolist() == [position for _, position in flat]
        places = [blocks[slot][position // 4] * 4 + position % 4 for slot, position in flat]
        assert batch.metadata.slot_mapping.tolist() == places
        ends = np.cumsum([lens[slot] for slot in order])
        last = [float(end - 1) for end, slot in zip(ends, order, strict=True) if lens[slot] == known[slot]]
        assert batch.sampling_rows(torch.arange(float(len(flat)))[:, None]).flatten().tolist() == last


def test_rows_filled_in_a_step_that_was_computed_elsewhere_make_a_new_index(steps: Steps) -> None:
    """A captured step is replayed without this builder, and brings a request of other parameters into the same slot."""
    steps.run([2], [], [new_request(2, [9], [30], SamplingRow(temperature=1.0, seed=1))])
    before = steps.run([2], [])
    replayed = steps.states.apply(SchedulerOutput(9, int32([2]), b"", [new_request(2, [8], [31])]))
    one = torch.tensor([1])
    steps.states.advance(replayed, torch.tensor([2]), one, replayed.slots)
    steps.states.record(torch.tensor([2]), one, one)
    after = steps.run([2], [])
    assert after.index is not before.index
    assert after.sampling.plain_rows is None


def test_prompt_parts_are_what_the_step_predicts_of_the_prompt(steps: Steps) -> None:
    reports = SamplingRow(prompt_logprobs=2)
    new = [
        new_request(0, [1, 2, 3, 4, 5, 6, 7], [30, 31], reports),
        new_request(1, [1, 2, 3, 4, 5], [40, 41], reports, num_prompt_tokens=3),
        new_request(3, [5, 6], [50]),
    ]
    batch = steps.run([0, 1, 3], [3, 5, 2], new)
    assert batch.prompt_parts == [
        PromptPart(row=0, slot=0, start=1, count=3, first=0, k=2),
        PromptPart(row=1, slot=1, start=1, count=2, first=3, k=2),
    ]
    (part,) = steps.run([1, 0], [3]).prompt_parts
    assert part == PromptPart(row=1, slot=0, start=4, count=3, first=1, k=2)
    assert steps.run([1, 0], []).prompt_parts == [], "its last token predicts the answer"


def test_a_prompt_that_is_cached_reports_what_is_computed(steps: Steps) -> None:
    cached = new_request(0, [1, 2, 3, 4, 5, 6, 7], [30, 31], SamplingRow(prompt_logprobs=0), num_computed_tokens=4)
    (part,) = steps.run([0], [3], [cached]).prompt_parts
    assert part == PromptPart(row=0, slot=0, start=5, count=2, first=0, k=0)
