"""The persistent rows: what a step changes, and that nothing else changes, over hundreds of random steps."""

import random

import numpy as np
import pytest
import torch

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.worker_proc.request_states import NUM_PROMPT, RequestStates
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes.fake_core import int32, new_request

LIMITS = StepLimits(
    num_slots=6,
    max_model_len=40,
    max_num_batched_tokens=64,
    num_blocks=200,
    block_size=4,
    vocab_size=100,
    num_valid_token_ids=100,
)
NUM_RANDOM_STEPS = 300


@pytest.fixture
def states() -> RequestStates:
    return RequestStates(LIMITS, torch.device("cpu"))


def compute(states: RequestStates, step: SchedulerOutput) -> None:
    """Applies a step and counts it as computed; whoever samples gets the token 90 + slot."""
    arrays = states.apply(step)
    ends = states.counts.num_computed[arrays.slots] + arrays.query_lens
    samples = arrays.slots[ends == states.counts.num_tokens[arrays.slots]]
    states.advance(arrays, torch.from_numpy(arrays.slots), torch.from_numpy(arrays.query_lens), samples)
    slots = torch.from_numpy(samples)
    states.record(slots, states.num_computed[slots], 90 + slots)


def test_a_new_request_fills_its_row_and_no_other(states: RequestStates) -> None:
    sampling = SamplingRow(0.5, 7, 0.9, 0.1, 2**64 - 3, 4, 2, int32([8, 9]))
    states.apply(SchedulerOutput(0, int32([2]), int32([3]), [new_request(2, [5, 6, 7], [11, 12], sampling)]))
    assert states.token_ids[2, :4].tolist() == [5, 6, 7, 0]
    assert states.block_table[2, :3].tolist() == [11, 12, 0]
    assert states.floats[2].tolist() == [0.5, 0.9, 0.1]
    assert states.integers[2].tolist() == [7, -3, 4, 3, 2]
    assert np.array_equal(states.host_integers[2], states.integers[2].numpy())
    assert states.stop_token_ids[2].tolist() == [8, 9]
    others = [0, 1, 3, 4, 5]
    assert not states.token_ids[others].any()
    assert not states.block_table[others].any()


def test_a_used_slot_keeps_no_block_of_the_request_before(states: RequestStates) -> None:
    states.apply(SchedulerOutput(0, int32([1]), int32([9]), [new_request(1, [3] * 9, [4, 5, 6])]))
    states.apply(SchedulerOutput(1, int32([1]), b"", [new_request(1, [8], [7])]))
    assert states.block_table[1].tolist() == [7] + [0] * 9
    assert states.token_ids[1, 0] == 8


def test_sampled_tokens_are_the_next_known_ones(states: RequestStates) -> None:
    compute(states, SchedulerOutput(0, int32([1]), int32([3]), [new_request(1, [5, 6, 7], [1, 2])]))
    compute(states, SchedulerOutput(1, int32([1])))
    assert states.token_ids[1, :6].tolist() == [5, 6, 7, 91, 91, 0]
    assert (states.counts.num_tokens[1], states.counts.num_computed[1], int(states.num_computed[1])) == (5, 4, 4)


def test_a_refused_step_leaves_every_row_as_it_was(states: RequestStates) -> None:
    compute(states, SchedulerOutput(0, int32([1]), int32([3]), [new_request(1, [5, 6, 7], [1, 2])]))
    before = snapshot(states)
    bad = SchedulerOutput(1, int32([1, 2]), b"", [new_request(1, [9], [3])], int32([1]), int32([4]))
    with pytest.raises(ProtocolError):
        states.apply(bad)
    assert snapshot(states) == before


def test_forgotten_slots_need_a_new_request(states: RequestStates) -> None:
    compute(states, SchedulerOutput(0, int32([1]), int32([3]), [new_request(1, [5, 6, 7], [1, 2])]))
    states.forget_all()
    with pytest.raises(ProtocolError, match="slot 1 is to compute more tokens than are known"):
        states.apply(SchedulerOutput(1, int32([1])))


def test_bytes_are_those_of_the_tensors(states: RequestStates) -> None:
    slots = LIMITS.num_slots
    assert states.num_bytes() == slots * (40 * 4 + 8 + 10 * 8 + 3 * 8 + 5 * 8)


class Reference:
    """One request, kept in plain lists."""

    def __init__(self, new: NewRequest, tokens: list[int], blocks: list[int]) -> None:
        self.new = new
        self.tokens = tokens
        self.blocks = blocks
        self.num_computed = new.num_computed_tokens


class RandomCore:
    """Joins, leaves, chunks, resumes, appends, copies on write, at random; keeps what the rows must hold."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.rows: dict[int, Reference] = {}

    def next_step(self, step_id: int) -> SchedulerOutput:
        chance = self.chance
        for slot in list(self.rows):
            if chance.random() < 0.05 or len(self.rows[slot].tokens) >= LIMITS.max_model_len - 1:
                del self.rows[slot]
        new = [self.join(slot) for slot in range(LIMITS.num_slots) if slot not in self.rows and chance.random() < 0.4]
        if not self.rows:
            new.append(self.join(0))
        chosen = [slot for slot in self.rows if chance.random() < 0.8] or [next(iter(self.rows))]
        counts = {slot: self.count(slot) for slot in chosen}
        order = sorted(counts, key=lambda slot: counts[slot] > 1)
        appended = [(slot, block) for slot in order for block in self.grow(slot, counts[slot])]
        for slot in order:
            self.compute(slot, counts[slot])
        return SchedulerOutput(
            step_id,
            int32(order),
            int32(counts[slot] for slot in order if counts[slot] > 1),
            new,
            int32(slot for slot, _ in appended),
            int32(block for _, block in appended),
        )

    def join(self, slot: int) -> NewRequest:
        tokens = [self.chance.randrange(100) for _ in range(self.chance.randrange(1, 25))]
        prompt, computed = self.chance.randint(1, len(tokens)), self.chance.randrange(len(tokens))
        blocks = [
            self.block() for _ in range(-(-len(tokens) // 4) if self.chance.random() < 0.5 else -(-computed // 4))
        ]
        sampling = SamplingRow(temperature=self.chance.random(), seed=self.chance.randrange(2**64))
        new = new_request(slot, tokens, blocks, sampling, num_prompt_tokens=prompt, num_computed_tokens=computed)
        self.rows[slot] = Reference(new, tokens, blocks)
        return new

    def count(self, slot: int) -> int:
        row = self.rows[slot]
        return self.chance.randint(1, min(len(row.tokens) - row.num_computed, 10))

    def grow(self, slot: int, count: int) -> list[int]:
        row = self.rows[slot]
        added = [self.block() for _ in range(-(-(row.num_computed + count) // 4) - len(row.blocks))]
        row.blocks += added
        return added

    def compute(self, slot: int, count: int) -> None:
        row = self.rows[slot]
        row.num_computed += count
        if row.num_computed == len(row.tokens):
            row.tokens.append(90 + slot)

    def block(self) -> int:
        return self.chance.randrange(1, LIMITS.num_blocks)


def test_after_300_random_steps_the_rows_are_those_of_a_rebuilt_state() -> None:
    """Rebuilt: every request given anew, with all it has by then, to rows that were never used."""
    for seed in range(3):
        core, states = RandomCore(seed), RequestStates(LIMITS, torch.device("cpu"))
        for step_id in range(NUM_RANDOM_STEPS):
            compute(states, core.next_step(step_id))
        rebuilt = RequestStates(LIMITS, torch.device("cpu"))
        again = []
        for slot, row in core.rows.items():
            counts = {"num_prompt_tokens": row.new.num_prompt_tokens, "num_computed_tokens": row.num_computed}
            blocks = [*row.blocks, *[1] * (-(-len(row.tokens) // 4) - len(row.blocks))]
            again.append(new_request(slot, row.tokens, blocks, row.new.sampling, **counts))
        rebuilt.apply(SchedulerOutput(0, int32(core.rows), b"", again))
        for slot, row in core.rows.items():
            known = len(row.tokens)
            assert states.token_ids[slot, :known].tolist() == rebuilt.token_ids[slot, :known].tolist() == row.tokens
            assert states.block_table[slot, : len(row.blocks)].tolist() == row.blocks
            assert not states.block_table[slot, len(row.blocks) :].any()
        slots = list(core.rows)
        assert torch.equal(states.num_computed[slots], rebuilt.num_computed[slots])
        assert torch.equal(states.floats[slots], rebuilt.floats[slots])
        assert torch.equal(states.integers[slots], rebuilt.integers[slots])
        assert states.num_computed.tolist() == states.counts.num_computed.tolist()
        assert states.counts.num_tokens[slots].tolist() == [len(core.rows[slot].tokens) for slot in slots]
        assert states.host_integers[slots, NUM_PROMPT].tolist() == states.integers[slots, NUM_PROMPT].tolist()


def snapshot(states: RequestStates) -> list[object]:
    tensors = (states.token_ids, states.num_computed, states.block_table, states.floats, states.integers)
    counts = states.counts
    arrays = (counts.num_tokens, counts.num_computed, counts.num_blocks, states.host_floats, states.host_integers)
    return [tensor.tolist() for tensor in tensors] + [array.tolist() for array in arrays]
