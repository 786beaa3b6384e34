"""What each request did in each step, as it follows from a run's records."""

import collections

import pytest

from folovllm.common.errors import ConfigError
from folovllm.common.trace_file import Scheduled, TraceRecord
from folovllm.frontend import int32
from folovllm.frontend.trace_view import Cell, TraceView, build_view
from tests.fakes.traced_engine import HEADER, TracedEngine


def kinds(view: TraceView) -> list[str]:
    """A letter for each step a request was there in."""
    return ["".join(row.cells[step].kind[0] for step in sorted(row.cells)) for row in view.rows]


def crowded() -> TracedEngine:
    """Three requests of which one is preempted."""
    engine = TracedEngine(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=12, depth=1)
    for i in range(3):
        engine.add(6 + i, max_tokens=12)
    engine.run()
    return engine


def test_chunks_decodes_and_waiting() -> None:
    engine = TracedEngine(max_num_seqs=1, max_num_batched_tokens=4, depth=1)
    engine.add(6, max_tokens=3)
    engine.add(2, max_tokens=2)
    engine.run()
    view = build_view(HEADER, engine.records)
    assert kinds(view) == ["ppdd", "wwwwpd"]
    assert [view.rows[0].cells[step] for step in (0, 1, 2)] == [Cell("prompt", 4), Cell("prompt", 2), Cell("decode", 1)]
    assert [column.step_id for column in view.columns] == list(range(6))
    first = view.rows[0]
    assert (first.reason, first.num_output_tokens, first.num_prompt_tokens) == ("length", 3, 6)


def test_a_cached_beginning_is_marked_where_the_request_got_its_slot() -> None:
    engine = TracedEngine(depth=1)
    prompt = list(range(10))
    engine.add(prompt, max_tokens=1)
    engine.run()
    engine.add(prompt, n=2, max_tokens=2)
    engine.run()
    view = build_view(HEADER, engine.records)
    assert [row.num_cached_tokens for row in view.rows] == [0, 8, 9]
    assert view.rows[1].cells[1] == Cell("prompt", 2, 8)
    assert view.rows[2].cells[1] == Cell("waiting")
    assert view.rows[2].cells[2] == Cell("prompt", 1, 9)
    assert [row.name for row in view.rows] == ["r0", "r1", "r1/1"]
    assert [row.num_prompt_tokens for row in view.rows] == [10, 10, 10]
    assert (view.totals.num_prompt_tokens, view.totals.num_cached_tokens) == (30, 17)


def test_preemption_is_marked_and_the_prompt_computed_anew() -> None:
    engine = crowded()
    view = build_view(HEADER, engine.records)
    assert view.totals.num_preemptions == sum(row.num_preemptions for row in view.rows) > 0
    assert view.totals.num_prompt_tokens == 6 + 7 + 8
    for row, letters in zip(view.rows, kinds(view), strict=True):
        marked = sum(cell.kind == "preempted" for cell in row.cells.values())
        assert marked == row.num_preemptions
        again = letters.split("p", 1)[1].count("wp") if row.num_preemptions else 0
        assert again <= row.num_preemptions


@pytest.mark.parametrize("depth", [1, 2])
def test_block_tables_are_those_of_the_engine(depth: int) -> None:
    engine = TracedEngine(num_blocks=14, block_size=4, max_num_seqs=3, max_num_batched_tokens=12, depth=depth)
    expected: dict[int, dict[int, tuple[int, ...]]] = {}
    engine.add(5, n=2, max_tokens=9)
    engine.add(9, max_tokens=9)
    while engine.scheduler.has_unfinished or engine.in_flight:
        while len(engine.in_flight) < depth and engine.schedule() is not None:
            running = [request for request in engine.requests if request.slot is not None]
            expected[engine.steps[-1].step_id] = {
                request.arrival_order: tuple(engine.manager.block_ids(request.slot)) for request in running
            }
        engine.update()
    view = build_view(HEADER, engine.records)
    assert {column.step_id: column.tables for column in view.columns} == expected
    for column in view.columns:
        held = {block for table in column.tables.values() for block in table}
        assert column.num_free_blocks == 14 - len(held)


def test_columns_tell_what_was_computed_and_which_blocks_came_and_went() -> None:
    engine = TracedEngine(max_num_seqs=2, max_num_batched_tokens=8, block_size=4, depth=1)
    engine.add(list(range(12)), max_tokens=4)
    engine.add(list(range(9)), max_tokens=3)
    engine.run()
    columns = build_view(HEADER, engine.records).columns
    assert [(column.num_prompt_tokens, column.num_decodes) for column in columns] == [
        (8, 0),
        (5, 0),
        (0, 2),
        (0, 2),
        (0, 1),
    ]
    assert [(column.num_taken_blocks, column.num_freed_blocks) for column in columns] == [
        (3, 0),
        (1, 0),
        (1, 0),
        (0, 0),
        (0, 1),
    ]
    assert [column.events for column in columns] == [
        ["r0 got a slot"],
        ["r1 got a slot (8 tokens taken over)"],
        [],
        [],
        ["r1 ended (length)"],
    ]
    later = build_view(HEADER, engine.records, first=2).columns
    assert later == columns[2:], "the first one that is kept is compared with the one before it"


def test_events_tell_preemptions() -> None:
    engine = crowded()
    events = [event for column in build_view(HEADER, engine.records).columns for event in column.events]
    assert sum(event.endswith(" preempted") for event in events) == engine.scheduler.counters.num_preemptions
    assert sum(" got a slot" in event for event in events) == 3 + engine.scheduler.counters.num_preemptions


def test_the_end_of_a_worker_is_an_event_and_all_who_ran_are_preempted() -> None:
    engine = TracedEngine(depth=1)
    engine.add(3, max_tokens=4)
    engine.add(4, max_tokens=4)
    engine.turn()
    engine.lose_worker()
    engine.run()
    view = build_view(HEADER, engine.records)
    assert view.columns[1].events == [
        "the worker ended; another one computes anew what it held",
        "r0 preempted",
        "r1 preempted",
        "r0 got a slot",
        "r1 got a slot",
    ]
    assert view.totals.num_preemptions == 2
    assert all(record.tables.keys() == {0, 1} for record in view.columns[:2])


def test_a_slot_without_work_and_an_end_from_outside() -> None:
    engine = TracedEngine(depth=2)
    engine.add(3, max_tokens=1)
    engine.add(3, max_tokens=6)
    engine.schedule()
    engine.schedule()  # the first one's only token is on its way
    engine.finish(engine.requests[1:])
    engine.run()
    view = build_view(HEADER, engine.records)
    assert kinds(view) == ["pi", "pd"]
    assert [row.reason for row in view.rows] == ["length", "abort"]


def test_steps_and_requests_are_chosen_and_the_totals_are_the_runs() -> None:
    engine = TracedEngine(depth=1)
    engine.add(3, max_tokens=8)
    engine.add(3, max_tokens=2)
    engine.run()
    view = build_view(HEADER, engine.records, first=1, end=3)
    assert [column.step_id for column in view.columns] == [1, 2]
    assert kinds(view) == ["dd", "d"]
    assert (view.totals.num_steps, view.totals.num_output_tokens, view.totals.num_requests) == (8, 10, 2)
    assert [row.request for row in build_view(HEADER, engine.records, requests=["1"]).rows] == [1]
    assert [row.request for row in build_view(HEADER, engine.records, requests=["r0"]).rows] == [0]
    assert build_view(HEADER, engine.records, requests=["nobody"]).rows == []
    assert build_view(HEADER, engine.records, first=99).columns == []


def test_an_empty_run_is_empty() -> None:
    view = build_view(HEADER, [])
    assert (view.columns, view.rows, view.totals.seconds) == ([], [], 0.0)


def test_every_beginning_of_a_run_can_be_drawn() -> None:
    records = crowded().records
    counted = collections.Counter(build_view(HEADER, records[:size]).totals.num_steps for size in range(len(records)))
    assert max(counted) == sum(isinstance(record, Scheduled) for record in records[:-1])


def test_a_run_that_contradicts_itself_is_refused() -> None:
    records: list[TraceRecord] = [Scheduled(1.0, 0, int32.pack([3]), b"", 9)]
    with pytest.raises(ConfigError, match="contradicts itself: KeyError: 3"):
        build_view(HEADER, records)
    with pytest.raises(ConfigError, match="contradicts itself"):
        build_view(HEADER, [Scheduled(1.0, 0, b"abc", b"", 9)])
