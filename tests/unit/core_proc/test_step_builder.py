"""What a pass puts together becomes one message and one record of the step in flight."""

import numpy as np
import pytest

from folovllm.common.messages.core_worker import NewRequest, SamplingRow
from folovllm.core_proc.kv_cache_manager import BlockCopy
from folovllm.core_proc.request import Request
from folovllm.core_proc.slot_table import SlotTable
from folovllm.core_proc.step_builder import StepBuilder
from folovllm.core_proc.step_time import StepLoad
from tests.fakes.simulated_worker import int32, integers


def table_of(*num_prompt: int) -> SlotTable:
    table = SlotTable(8, 4)
    for count in num_prompt:
        slot = table.take(Request(0, 0, "r", np.zeros(count, np.int32), SamplingRow(), 9), 40)
        table.grow(np.array([slot]), 8)
    return table


def test_decodes_alone_need_no_counts() -> None:
    table = table_of(1, 5, 1)
    step = StepBuilder(10)
    assert step.is_empty
    step.add_decodes(np.array([0, 2]), 30)
    assert (step.budget, step.is_empty) == (8, False)
    output, in_flight = step.build(4, table, 0.5)
    assert output.step_id == in_flight.step_id == 4
    assert integers(output.slots) == [0, 2]
    assert output.num_scheduled_tokens == output.append_slots == output.block_copies == b""
    assert in_flight.samples.tolist() == [True, True]
    assert (in_flight.load, in_flight.scheduled_at_s) == (StepLoad(2, 30), 0.5)


def test_single_tokens_come_before_longer_chunks() -> None:
    table = table_of(6, 1, 9, 1)
    step = StepBuilder(12)
    step.add_decodes(np.array([1]), 0)
    step.add_chunk(2, 4, 0)
    step.add_chunk(3, 1, 0)
    step.add_chunk(0, 6, 0)
    assert step.budget == 0
    assert (step.has(0), step.has(1), step.num_completed(table)) == (True, False, 1)
    output, in_flight = step.build(0, table, 0.5)
    assert integers(output.slots) == [1, 3, 2, 0]
    assert integers(output.num_scheduled_tokens) == [4, 6]
    assert in_flight.samples.tolist() == [True, True, False, True]
    assert in_flight.num_computed.tolist() == [1, 1, 4, 6]


def test_a_chunk_of_one_token_that_is_not_the_last_does_not_sample() -> None:
    table = table_of(6)
    step = StepBuilder(1)
    step.add_chunk(0, 1, 0)
    output, in_flight = step.build(0, table, 0.5)
    assert integers(output.slots) == [0]
    assert output.num_scheduled_tokens == b""
    assert in_flight.samples.tolist() == [False]
    assert (table.num_computed[0], table.num_known[0]) == (1, 6)


def test_without_budget_there_is_no_chunk() -> None:
    step = StepBuilder(2)
    step.add_decodes(np.array([0, 1]), 0)
    with pytest.raises(AssertionError, match="slot 2"):
        step.add_chunk(2, 3, 0)


def test_the_load_counts_pairs_of_tokens_in_a_chunk_and_its_context() -> None:
    step = StepBuilder(20)
    step.add_decodes(np.array([0]), 7)
    step.add_chunk(1, 3, 10)  # attends to 11, 12 and 13 tokens
    step.add_chunk(2, 2, 0)  # to 1 and 2
    assert step.load == StepLoad(num_decodes=1, num_context=17, num_prefill=5, num_pairs=39.0)


def test_new_requests_blocks_and_copies_travel_as_given() -> None:
    table = table_of(3, 3)
    new = NewRequest(1, int32([1, 2, 3]), 3, 2, int32([4, 9]), SamplingRow(seed=1))
    step = StepBuilder(10)
    step.add_new_request(new, [BlockCopy(0, 5, 9)])
    step.add_chunk(1, 1, 2)
    step.add_blocks([0], [6])
    step.add_blocks([1, 0], [7, 8])
    output, _ = step.build(0, table, 0.5)
    assert output.new_requests == [new]
    assert integers(output.block_copies) == [5, 9]
    assert integers(output.append_slots) == [0, 1, 0]
    assert integers(output.append_block_ids) == [6, 7, 8]


def test_a_step_remembers_the_epochs_of_its_slots() -> None:
    table = table_of(1, 1)
    step = StepBuilder(4)
    step.add_decodes(np.array([0, 1]), 0)
    _, in_flight = step.build(0, table, 0.5)
    table.release(table.request(0))
    assert (table.epoch[in_flight.slots] == in_flight.epochs).tolist() == [False, True]
