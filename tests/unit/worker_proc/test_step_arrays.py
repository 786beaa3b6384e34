"""Reading and checking a step: what fits comes out as arrays, all else is refused by name and changes nothing."""

from typing import Any

import numpy as np
import pytest

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.worker_proc.step_arrays import SlotCounts, StepArrays, StepLimits, read_step
from tests.fakes.fake_core import int32, new_request

LIMITS = StepLimits(
    num_slots=4,
    max_model_len=32,
    max_num_batched_tokens=24,
    num_blocks=20,
    block_size=4,
    vocab_size=100,
    num_valid_token_ids=100,
)


def counts() -> SlotCounts:
    """Slot 0 decodes (6 of 7 tokens computed, 2 blocks); slot 1 has 10 of 20 (5 blocks); slot 2 is full; 3 is empty."""
    made = SlotCounts.empty(4)
    made.num_tokens[:] = [7, 20, 32, 0]
    made.num_computed[:] = [6, 10, 31, 0]
    made.num_blocks[:] = [2, 5, 8, 0]
    return made


def read(**fields: Any) -> StepArrays:
    return read_step(SchedulerOutput(1, **fields), counts(), LIMITS)


def test_decodes_come_first_then_those_with_more_tokens() -> None:
    arrays = read(slots=int32([0, 1]), num_scheduled_tokens=int32([10]))
    assert arrays.slots.tolist() == [0, 1]
    assert arrays.query_lens.tolist() == [1, 10]
    assert arrays.num_decodes == 1


def test_a_step_without_changes_copies_no_counts() -> None:
    before = counts()
    assert read_step(SchedulerOutput(1, int32([0])), before, LIMITS).counts is before


def test_new_requests_are_counted_before_they_are_scheduled() -> None:
    new = new_request(3, [1, 2, 3, 4, 5], [7, 8], num_prompt_tokens=3, num_computed_tokens=2)
    arrays = read(slots=int32([3]), num_scheduled_tokens=int32([3]), new_requests=[new])
    (row,) = arrays.new_rows
    assert (row.slot, row.token_ids.tolist(), row.block_ids.tolist()) == (3, [1, 2, 3, 4, 5], [7, 8])
    assert (row.num_prompt_tokens, row.num_computed_tokens) == (3, 2)
    after = arrays.counts
    assert (after.num_tokens[3], after.num_computed[3], after.num_blocks[3]) == (5, 2, 2)


def test_appended_blocks_go_to_the_end_one_after_another() -> None:
    arrays = read(slots=int32([0]), append_slots=int32([1, 0, 1]), append_block_ids=int32([9, 11, 10]))
    assert arrays.entries.slots.tolist() == [1, 0, 1]
    assert arrays.entries.columns.tolist() == [5, 2, 6]
    assert arrays.entries.block_ids.tolist() == [9, 11, 10]
    assert arrays.counts.num_blocks.tolist() == [3, 7, 8, 0]


def test_blocks_may_be_appended_to_a_request_of_the_same_step() -> None:
    new = new_request(3, [1] * 9, [7, 8])
    arrays = read(
        slots=int32([3]),
        num_scheduled_tokens=int32([9]),
        new_requests=[new],
        append_slots=int32([3]),
        append_block_ids=int32([9]),
    )
    assert arrays.entries.columns.tolist() == [2]


def test_block_copies_are_pairs() -> None:
    arrays = read(slots=int32([0]), block_copies=int32([3, 4, 3, 5]))
    assert arrays.copy_sources.tolist() == [3, 3]
    assert arrays.copy_destinations.tolist() == [4, 5]


def test_stop_ids_without_a_column_are_left_out() -> None:
    new = new_request(3, [1], [7], SamplingRow(stop_token_ids=int32([5, 100, -1, 99])))
    (row,) = read(slots=int32([3]), new_requests=[new]).new_rows
    assert row.stop_token_ids.tolist() == [5, 99]


def sampled(**fields: Any) -> dict[str, Any]:
    return {"slots": int32([3]), "new_requests": [new_request(3, [1], [7], SamplingRow(**fields))]}


def with_new(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "slot": 3,
        "token_ids": int32([1, 2]),
        "num_prompt_tokens": 2,
        "num_computed_tokens": 0,
        "block_ids": int32([7]),
        "sampling": SamplingRow(),
    }
    return {"slots": int32([3]), "num_scheduled_tokens": int32([2]), "new_requests": [NewRequest(**values | fields)]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"slots": b""}, "slots is empty"),
    ({"slots": b"123"}, "slots: 3 bytes are no whole number of int32"),
    ({"slots": int32([4])}, "slots: 4 is out of range; it must be 0 to 3"),
    ({"slots": int32([-1])}, "slots: -1 is out of range"),
    ({"slots": int32([0, 0])}, "slots: a slot occurs twice"),
    ({"slots": int32([3])}, "slot 3 is to compute more tokens than are known for it"),
    ({"slots": int32([2])}, "slot 2 has no room for one more token"),
    ({"slots": int32([1]), "num_scheduled_tokens": int32([11])}, "slot 1 is to compute more tokens than are known"),
    ({"slots": int32([1]), "num_scheduled_tokens": int32([1])}, "num_scheduled_tokens: 1 is out of range"),
    ({"slots": int32([1]), "num_scheduled_tokens": int32([25])}, "num_scheduled_tokens: 25 is out of range"),
    ({"slots": int32([1]), "num_scheduled_tokens": int32([2, 2])}, "num_scheduled_tokens has 2 entries, slots only 1"),
    (with_new(slot=4), "new request in slot 4: slots are 0 to 3"),
    (with_new(slot=-1), "new request in slot -1: slots are 0 to 3"),
    (with_new(token_ids=b""), "0 tokens, not 1 to 32"),
    (with_new(token_ids=int32(range(33))), "33 tokens, not 1 to 32"),
    (with_new(token_ids=int32([1, 100])), "token_ids: 100 is out of range; it must be 0 to 99"),
    (with_new(token_ids=b"12345"), "token_ids: 5 bytes"),
    (with_new(block_ids=int32([0])), "block_ids: 0 is out of range; it must be 1 to 19"),
    (with_new(block_ids=int32([20])), "block_ids: 20 is out of range"),
    (with_new(block_ids=int32([1] * 9)), "9 blocks, at most 8"),
    (with_new(block_ids=b""), "slot 3 has too few blocks"),
    (with_new(num_prompt_tokens=0), "num_prompt_tokens=0 of 2 tokens"),
    (with_new(num_prompt_tokens=3), "num_prompt_tokens=3 of 2 tokens"),
    (with_new(num_computed_tokens=2), "num_computed_tokens=2 of 2 tokens"),
    (with_new(num_computed_tokens=-1), "num_computed_tokens=-1 of 2 tokens"),
    (with_new(num_computed_tokens=1), "slot 3 is to compute more tokens"),
    (sampled(temperature=-1.0), "temperature=-1.0"),
    (sampled(temperature=float("nan")), "temperature=nan"),
    (sampled(temperature=float("inf")), "temperature=inf"),
    (sampled(top_k=-1), "top_k=-1"),
    (sampled(top_k=2**40), "top_k="),
    (sampled(top_p=0.0), "top_p=0.0"),
    (sampled(top_p=float("nan")), "top_p=nan"),
    (sampled(min_p=1.5), "min_p=1.5"),
    (sampled(sample_index=-1), "sample_index=-1"),
    (sampled(min_tokens=-1), "min_tokens=-1"),
    (sampled(stop_token_ids=b"1"), "stop_token_ids: 1 bytes"),
    ({"slots": int32([3]), "new_requests": [new_request(3, [1], [7])] * 2}, "new_requests: a slot occurs twice"),
    ({"slots": int32([0]), "append_slots": int32([0])}, "append_slots has 1 entries, append_block_ids 0"),
    ({"slots": int32([0]), "append_slots": int32([7]), "append_block_ids": int32([1])}, "append_slots: 7 is out of"),
    (
        {"slots": int32([0]), "append_slots": int32([0]), "append_block_ids": int32([0])},
        "append_block_ids: 0 is out of",
    ),
    ({"slots": int32([0]), "append_slots": int32([2]), "append_block_ids": int32([5])}, "a slot has 8 blocks already"),
    ({"slots": int32([0]), "block_copies": int32([1])}, "block_copies has an odd number"),
    ({"slots": int32([0]), "block_copies": int32([1, 20])}, "block_copies: 20 is out of range"),
    ({"slots": int32([0]), "block_copies": int32([0, 2])}, "block_copies: 0 is out of range"),
    ({"slots": int32([0]), "block_copies": int32([1, 3, 2, 3])}, "block_copies: two copies into the same block"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    before = counts()
    with pytest.raises(ProtocolError) as caught:
        read_step(SchedulerOutput(1, **fields), before, LIMITS)
    assert message in str(caught.value)
    unchanged = counts()
    assert np.array_equal(before.num_tokens, unchanged.num_tokens)
    assert np.array_equal(before.num_computed, unchanged.num_computed)
    assert np.array_equal(before.num_blocks, unchanged.num_blocks)


def test_more_tokens_than_a_step_may_have_are_refused() -> None:
    new = [new_request(slot, [1] * 13, [1, 2, 3, 4]) for slot in (0, 1)]
    with pytest.raises(ProtocolError, match="26 tokens are more than 24"):
        read(slots=int32([0, 1]), num_scheduled_tokens=int32([13, 13]), new_requests=new)


def test_token_masks_are_rows_of_words() -> None:
    masks = np.arange(8, dtype="<u4")  # 100 ids take 4 words
    lens = int32([10])
    arrays = read(
        slots=int32([0, 1]), num_scheduled_tokens=lens, masked_slots=int32([1, 0]), token_masks=masks.tobytes()
    )
    assert arrays.masked_slots.tolist() == [1, 0]
    assert arrays.token_masks.dtype == np.uint32
    assert arrays.token_masks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert arrays.token_masks.flags.writeable, "torch shares the memory"
    plain = read(slots=int32([0]))
    assert (len(plain.masked_slots), plain.token_masks.size) == (0, 0)


@pytest.mark.parametrize(
    ("masked", "num_words", "message"),
    [
        ([0], 3, "token_masks has 12 bytes for 1 masks, not 16"),
        ([], 4, "token_masks has 16 bytes for 0 masks, not 0"),
        ([0, 0], 8, "masked_slots: a slot occurs twice"),
        ([1], 4, "slot 1 has a token mask and samples nothing in this step"),
        ([3], 4, "slot 3 has a token mask and samples nothing in this step"),
        ([4], 4, "slot 4 has a token mask and samples nothing in this step"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masked: list[int], num_words: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read(
            slots=int32([0, 1]),
            num_scheduled_tokens=int32([3]),
            masked_slots=int32(masked),
            token_masks=bytes(4 * num_words),
        )
