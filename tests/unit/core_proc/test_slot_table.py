"""Rows of running requests: taking and giving up slots, and the array operations of a step."""

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.core_proc.request import Request
from folovllm.core_proc.slot_table import STOP_COLUMNS, SlotTable
from tests.fakes.simulated_worker import int32


def a_request(num_prompt: int = 3, output: list[int] | None = None, stop: list[int] | None = None) -> Request:
    sampling = SamplingRow(stop_token_ids=int32(stop or []))
    request = Request(2, 9, "r", np.zeros(num_prompt, np.int32), sampling, 10, stream=True)
    request.output_token_ids = np.array(output or [], np.int32)
    return request


def slots(*values: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array(values, np.int64)


def tokens(*values: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array(values, np.int32)


def test_the_lowest_free_slot_is_taken_and_the_end_follows() -> None:
    table = SlotTable(4, 4)
    requests = [a_request() for _ in range(3)]
    assert [table.take(request, 10) for request in requests] == [0, 1, 2]
    assert (table.end, table.num_used, table.num_free) == (3, 3, 1)
    table.release(requests[1])
    assert (table.end, table.num_used, table.num_free) == (3, 2, 2)
    table.release(requests[2])
    assert (table.end, table.num_used, table.num_free) == (1, 1, 3)
    assert table.take(requests[1], 10) == 1
    assert table.running() == [requests[0], requests[1]]
    assert table.request(1) is requests[1]
    with pytest.raises(AssertionError, match="slot 2"):
        table.request(2)


def test_giving_up_a_slot_starts_a_new_epoch_and_keeps_the_output() -> None:
    table = SlotTable(2, 4)
    request = a_request(num_prompt=3, output=[7, 8])
    slot = table.take(request, 10)
    table.num_known[slot] += 1
    table.confirm(slots(slot), tokens(9))
    table.release(request)
    assert request.output_token_ids.tolist() == [7, 8, 9]
    assert request.output_token_ids.dtype == np.int32
    assert request.slot is None
    assert table.epoch.tolist() == [1, 0]
    with pytest.raises(AssertionError):
        table.release(request)


def test_a_row_shows_nothing_of_the_one_before() -> None:
    table = SlotTable(1, 4)
    first = a_request(num_prompt=2, stop=[5])
    table.take(first, 10)
    table.grow(slots(0), 2)
    table.advance(slots(0), 2)
    table.release(first)
    table.take(a_request(num_prompt=4), 6)
    row = (table.num_known, table.num_computed, table.num_confirmed, table.capacity, table.limit)
    assert [int(counter[0]) for counter in row] == [4, 0, 4, 0, 6]
    assert not table.stops(slots(0), tokens(5), np.array([1]))[0]


def test_a_placeholder_appears_when_the_last_known_token_is_computed() -> None:
    table = SlotTable(3, 4)
    for num_prompt in (5, 1, 5):
        table.take(a_request(num_prompt), 10)
    assert table.advance(slots(0, 1, 2), np.array([4, 1, 5])).tolist() == [False, True, True]
    assert table.num_computed[:3].tolist() == [4, 1, 5]
    assert table.num_known[:3].tolist() == [5, 2, 6]
    assert table.num_confirmed[:3].tolist() == [5, 1, 5]
    assert table.advance(slots(0), 1).tolist() == [True]


def test_ready_tells_one_token_from_more_and_leaves_out_who_cannot_go_on() -> None:
    table = SlotTable(6, 4)
    for num_prompt, limit, capacity in ((5, 10, 2), (1, 10, 1), (4, 10, 1), (2, 3, 1), (1, 9, 1)):
        slot = table.take(a_request(num_prompt), limit)
        table.grow(slots(slot), capacity)
    table.advance(slots(2), 4)
    table.advance(slots(3), 2)
    table.release(table.request(4))
    assert [group.tolist() for group in table.ready()] == [[1], [0]]
    assert table.without_room().tolist() == [2]
    assert table.is_any_finishing()
    table.grow(slots(2))
    assert [group.tolist() for group in table.ready()] == [[1, 2], [0]]
    table.release(table.request(3))
    assert not table.is_any_finishing()


def test_an_empty_table_has_nothing_ready() -> None:
    table = SlotTable(3, 4)
    assert [group.size for group in table.ready()] == [0, 0]
    assert table.without_room().size == 0
    assert not table.is_any_finishing()
    assert table.running() == []


def test_confirmed_tokens_go_to_their_rows() -> None:
    table = SlotTable(3, 4)
    requests = [a_request(1, output) for output in ([], [4], [5, 6])]
    for request in requests:
        table.take(request, 10)
    assert table.confirm(slots(2, 0), tokens(70, 80)).tolist() == [3, 1]
    assert table.confirm(slots(2), tokens(71)).tolist() == [4]
    assert [table.num_output(slot) for slot in range(3)] == [1, 1, 4]
    for request in requests:
        table.release(request)
    assert [request.output_token_ids.tolist() for request in requests] == [[80], [4], [5, 6, 70, 71]]


def test_outputs_of_any_length_are_kept_when_the_matrix_grows() -> None:
    table = SlotTable(2, 16)
    short, long = a_request(1, [1, 2, 3]), a_request(1)
    table.take(short, 4000)
    table.take(long, 4000)
    table.grow(slots(0, 1))
    for position in range(1000):
        if position + 1 >= table.capacity[1]:
            table.grow(slots(1))
        table.confirm(slots(1), tokens(position))
    table.release(long)
    table.release(short)
    assert long.output_token_ids.tolist() == list(range(1000))
    assert short.output_token_ids.tolist() == [1, 2, 3]
    table.take(long, 4000)
    assert table.num_output(0) == 1000


@pytest.mark.parametrize("num_ids", [1, STOP_COLUMNS, STOP_COLUMNS + 1, 300])
def test_stop_sets_of_any_size(num_ids: int) -> None:
    table = SlotTable(3, 4)
    stop = list(range(100, 100 + num_ids))
    for stop_ids in (stop, [], [7]):
        table.take(a_request(1, stop=stop_ids), 10)
    count = np.array([1, 1, 1])
    last = stop[-1]
    assert table.stops(slots(0, 1, 2), tokens(last, last, 7), count).tolist() == [True, False, True]
    assert table.stops(slots(2, 1, 0), tokens(last, last, last + 1), count).tolist() == [False, False, False]
    table.release(table.request(0))
    table.take(a_request(1), 10)
    assert table.stops(slots(0), tokens(last), count[:1]).tolist() == [False]


def test_no_stop_below_min_tokens() -> None:
    table = SlotTable(1, 4)
    request = a_request(1, stop=[7])
    request.sampling = SamplingRow(stop_token_ids=int32([7]), min_tokens=3)
    table.take(request, 10)
    stops = [bool(table.stops(slots(0), tokens(7), np.array([count]))[0]) for count in (1, 2, 3, 4)]
    assert stops == [False, False, True, True]
