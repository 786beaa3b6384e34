"""How a whole command is timed; the rest of `bench.startup` starts engines."""

import sys

import pytest

from bench.startup import timed


def test_a_command_is_timed_to_its_first_line_and_to_its_end() -> None:
    once = timed([sys.executable, "-c", "print(1)"])
    assert 0 < once.printed_s < once.ended_s


@pytest.mark.parametrize(("program", "code"), [("print(1); raise SystemExit(3)", 3), ("pass", 0)])
def test_a_command_that_fails_or_prints_nothing_is_an_error(program: str, code: int) -> None:
    with pytest.raises(RuntimeError, match=f"exit code {code}"):
        timed([sys.executable, "-c", program])
