"""A run as text."""

import msgspec

from folovllm.common.trace_file import TraceHeader
from folovllm.frontend.trace_text import draw, draw_table
from folovllm.frontend.trace_view import build_view
from tests.fakes.traced_engine import HEADER, TracedEngine

SMALL = msgspec.structs.replace(HEADER, num_blocks=12, max_num_seqs=2, max_num_batched_tokens=8)
PICTURE = """\
simulated: 12 blocks of 4 tokens, up to 2 requests and 8 tokens a step, fcfs, prefix cache on, steps in flight: 2
3 requests, 6 steps in 12.000 s; 23 prompt tokens, 8 of them cached; 9 generated; 0 preemptions

▁…█ prompt (height: tokens)   ◆ begin of a prompt taken from the cache
─ decodes   · waits   _ has a slot, no work   × preempted

steps 0 to 5, 10.000 s
     0
a r0 █▄───
b r1 ·◆──
c r2 ····▂─

a r0 prompt of 12 tokens; ends by length with 4 tokens
b r1 prompt of 9 tokens, 8 cached; ends by length with 3 tokens
c r2 prompt of 2 tokens; ends by length with 2 tokens

blocks after step 5: 1 of 12 in use (+ shared, · free)
   1  ···c········"""


def small_run() -> TracedEngine:
    engine = TracedEngine(num_blocks=12, max_num_seqs=2, max_num_batched_tokens=8, depth=1)
    engine.add(list(range(12)), max_tokens=4)
    engine.add(list(range(9)), max_tokens=3)
    engine.add(2, max_tokens=2)
    engine.run()
    return engine


def drawn(engine: TracedEngine, width: int = 60, header: TraceHeader = HEADER, **chosen: object) -> list[str]:
    return draw(build_view(header, engine.records, **chosen), width).splitlines()  # type: ignore[arg-type]


def test_the_whole_picture() -> None:
    assert "\n".join(drawn(small_run(), header=SMALL)) == PICTURE


def test_shared_blocks_and_those_of_requests_that_are_not_shown() -> None:
    lines = drawn(small_run(), header=SMALL, end=3)
    assert lines[-2] == "blocks after step 2: 5 of 12 in use (+ shared, · free)"
    assert lines[-1] == "   1  ++aba·······"
    lines = drawn(small_run(), header=SMALL, end=3, requests=["1"])
    assert lines[-2].endswith("(+ shared, · free, ? of a request not shown)")
    assert lines[-1] == "   1  ++?a?·······"


def test_a_long_run_is_drawn_in_bands_as_wide_as_the_terminal() -> None:
    engine = TracedEngine(depth=1)
    engine.add(3, max_tokens=70)
    engine.run()
    lines = drawn(engine, width=35)
    bands = [index for index, line in enumerate(lines) if line.startswith("steps ")]
    assert [lines[index].split(",")[0] for index in bands] == ["steps 0 to 29", "steps 30 to 59", "steps 60 to 69"]
    assert lines[bands[0] + 1] == "     0         10        20"
    assert lines[bands[0] + 2] == "a r0 █" + "─" * 29
    assert lines[bands[2] + 1] == "     60"
    assert all(len(line) <= 35 for index in bands for line in lines[index + 1 : index + 3])


def test_a_ruler_that_begins_between_tens() -> None:
    engine = TracedEngine(depth=1)
    engine.add(3, max_tokens=70)
    engine.run()
    lines = drawn(engine, first=28, end=45)
    assert lines[7] == "     28          40", "30 has no room behind 28"
    assert lines[8] == "a r0 " + "─" * 17


def test_who_runs_on_was_preempted_or_has_no_name() -> None:
    engine = TracedEngine(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=12, depth=1)
    for i in range(3):
        engine.add(6 + i, max_tokens=12)
    engine.run()
    whole = drawn(engine)
    assert any("×" in line for line in whole[7:])
    assert any(line.endswith("; preemptions: 1") for line in whole)
    beginning = draw(build_view(HEADER, engine.records[:5]), 60)
    assert "runs on" in beginning
    engine.records[0] = msgspec.structs.replace(engine.records[0], request_id="")
    assert any(line.startswith("a 0 ") for line in drawn(engine))


def test_nothing_to_show_is_said() -> None:
    assert drawn(small_run(), first=50)[-1] == "nothing to show: no such step, or no such request in these steps"
    assert drawn(small_run(), requests=["x"])[-1].startswith("nothing to show")
    assert len(draw(build_view(HEADER, []), 60).splitlines()) == 2


def test_the_table_has_a_line_for_each_step() -> None:
    view = build_view(SMALL, small_run().records, first=1, end=4)
    _, _, empty, head, *lines = draw_table(view).splitlines()
    assert empty == ""
    assert head.split() == ["step", "time", "s", "prompt", "decodes", "taken", "freed", "free", "events"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert lines[0] == (
        "       1    3.0000         5         0         1         0         8  r1 got a slot (8 tokens taken over)"
    )
    assert lines[1] == "       2    5.0000         0         2         1         0         7"


def test_lines_of_free_blocks_are_left_out() -> None:
    engine = TracedEngine(num_blocks=200, depth=1)
    engine.add(3, max_tokens=3)
    engine.run()
    lines = drawn(engine, header=msgspec.structs.replace(HEADER, num_blocks=200))
    index = next(index for index, line in enumerate(lines) if line.startswith("blocks after"))
    (line,) = lines[index + 1 :]
    assert line.startswith("    1  ")
    assert line.count("a") == 2
