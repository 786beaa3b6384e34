"""The start-up table: what it adds, what it leaves unexplained, and how it reads."""

import pytest

from folovllm.common.messages.lifecycle import MemoryUse, PhaseTime
from folovllm.frontend.startup_table import StartupReport, Stopwatch, shown_bytes, with_python_starts

PHASES = [
    PhaseTime("frontend", "start core process", 0.0, 0.5),
    PhaseTime("frontend", "load tokenizer", 0.5, 1.0),
    PhaseTime("core", "import", 1.0, 1.0),
    PhaseTime("worker-0", "load weights", 2.5, 1.0),
]


def test_overlapping_phases_count_once() -> None:
    report = StartupReport(PHASES, [], 4.0)
    assert report.unexplained_s == pytest.approx(0.5 + 0.5)


def test_phases_after_the_end_do_not_explain_more_than_there_is() -> None:
    assert StartupReport([PhaseTime("frontend", "x", 0.0, 9.0)], [], 2.0).unexplained_s == 0.0
    assert StartupReport([], [], 2.0).unexplained_s == 2.0


def test_the_start_of_python_in_a_child_is_the_gap_before_its_first_phase() -> None:
    added = with_python_starts(PHASES)[len(PHASES) :]
    assert added == [
        PhaseTime("core", "start Python", 0.5, 0.5),
        PhaseTime("worker-0", "start Python", 2.0, 0.5),
    ]
    assert with_python_starts([PhaseTime("core", "import", 0.0, 1.0)]) == [PhaseTime("core", "import", 0.0, 1.0)]


def test_the_table_is_in_the_order_of_time_and_sums_up() -> None:
    lines = StartupReport(PHASES, [MemoryUse("weights", 3 * 2**20)], 4.0).table().splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["frontend", "frontend", "core", "worker-0"]
    assert lines[4].split()[-2:] == ["2.50", "1.00"]
    assert lines[5].split()[-1] == "1.00"
    assert lines[6].split()[-1] == "4.00"
    assert lines[-1].split() == ["weights", "3.0", "MiB"]
    assert "purpose" not in StartupReport(PHASES, [], 4.0).table()


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**29, "2.5 GiB"), (2**52, "4096.0 TiB")],
)
def test_shown_bytes(count: int, text: str) -> None:
    assert shown_bytes(count) == text


def test_stopwatch_notes_phases_one_after_the_other() -> None:
    watch = Stopwatch()
    with watch.phase("one"):
        pass
    with watch.phase("two"):
        pass
    one, two = watch.phases
    assert (one.phase, two.phase) == ("one", "two")
    assert 0 <= one.start_s <= one.start_s + one.seconds <= two.start_s + 1e-6
    report = watch.report([PhaseTime("core", "import", 50.0, 1.0)], [MemoryUse("weights", 1)])
    assert [phase.process for phase in report.phases] == ["frontend", "frontend", "core", "core"]
    assert report.wall_s < 50
