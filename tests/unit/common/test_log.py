"""One line format, on stderr, for FoloVLLM's own loggers only."""

import logging
import re
import time
from collections.abc import Iterator

import pytest

from folovllm.common.errors import ConfigError
from folovllm.common.log import ROOT_NAME, BoundedWarnings, check_level, get_logger, setup_logging


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger(ROOT_NAME)
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = handlers, level, propagate


def test_a_line_tells_time_level_process_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("core", "info")
    get_logger("folovllm.core_proc.x").warning("pool: %d blocks", 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING core     pool: 7 blocks\n", captured.err)


def test_the_level_holds_and_a_second_setup_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("core", "debug")
    setup_logging("worker-0", "Warning")
    logger = get_logger("folovllm.worker_proc")
    logger.info("not shown")
    logger.error("shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "worker-0 shown" in lines[0]


def test_other_loggers_are_left_alone() -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    setup_logging("core", "debug")
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


def test_an_unknown_level_is_refused() -> None:
    assert check_level("INFO") == "info"
    with pytest.raises(ConfigError, match="log level 'loud' is unknown; choose one of debug, info, warning, error"):
        check_level("loud")


def test_warnings_that_a_peer_causes_are_bounded_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    setup_logging("core", "info")
    warnings = BoundedWarnings(get_logger("folovllm.test"), "link ")
    for number in range(12):
        warnings.warning(f"frame {number}")
    now[0] += 1.0
    warnings.warning("later")
    lines = [line.split("core     ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [*(f"link frame {number}" for number in range(5)), "link 7 more such lines left out", "link later"]
