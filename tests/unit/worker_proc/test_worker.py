"""What the worker makes of a step that goes wrong, and the rows of the start-up table."""

import logging
import time
from typing import cast

import pytest

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.stop_signals import StopRequested
from folovllm.worker_proc.core_link import CoreLink
from folovllm.worker_proc.output_thread import OutputThread, PendingOutput
from folovllm.worker_proc.phases import Phases
from folovllm.worker_proc.worker import Answer, Worker, execute, prepare_ahead

STEP = SchedulerOutput(7, b"")


class ScriptedRunner:
    """Answers, or raises what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def execute(self, step: SchedulerOutput) -> PendingOutput:
        if self._error is not None:
            raise self._error
        return Answer(ModelRunnerOutput(step.step_id, b"tokn"))

    def prepare_ahead(self) -> bool:
        if self._error is not None:
            raise self._error
        return True


def test_a_result_is_passed_on() -> None:
    assert execute(ScriptedRunner(), STEP).wait() == ModelRunnerOutput(7, b"tokn")


@pytest.mark.parametrize(
    ("error", "text", "with_traceback"),
    [
        (ProtocolError("slots is empty"), "ProtocolError: slots is empty", False),
        (MemoryError("no room"), "MemoryError: no room", True),
        (RuntimeError("shape mismatch"), "RuntimeError: shape mismatch", True),
    ],
)
def test_an_error_is_the_steps_result(
    error: Exception,
    text: str,
    with_traceback: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("folovllm"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="folovllm"):
        output = execute(ScriptedRunner(error), STEP)
    assert output.step_id == 7
    assert output.wait() == ModelRunnerOutput(7, error=text)
    (record,) = caplog.records
    assert "step 7" in record.getMessage()
    assert bool(record.exc_info) == with_traceback


def test_an_order_to_end_is_no_result() -> None:
    class Interrupting:
        def execute(self, step: SchedulerOutput) -> PendingOutput:
            raise KeyboardInterrupt(step.step_id)

        def prepare_ahead(self) -> bool:
            return False

    with pytest.raises(KeyboardInterrupt):
        execute(Interrupting(), STEP)


def test_what_cannot_be_prepared_is_logged_and_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("folovllm"), "propagate", True)
    assert prepare_ahead(ScriptedRunner())
    with caplog.at_level(logging.ERROR, logger="folovllm"):
        assert not prepare_ahead(ScriptedRunner(RuntimeError("a kernel does not compile")))
    (record,) = caplog.records
    assert record.exc_info and "could not be prepared" in record.getMessage()


class ScriptedLink:
    """Steps and pauses as given, then the end."""

    def __init__(self, *script: SchedulerOutput | None) -> None:
        self._script = list(script)
        self.timeouts: list[int | None] = []

    def receive_step(self, timeout_ms: int | None) -> SchedulerOutput | None:
        self.timeouts.append(timeout_ms)
        if not self._script:
            raise StopRequested(0)
        return self._script.pop(0)


def test_pauses_are_used_until_nothing_is_left_to_prepare() -> None:
    prepared = iter([True, False, False])

    class Runner(ScriptedRunner):
        def prepare_ahead(self) -> bool:
            return next(prepared)

    class Outputs(list[PendingOutput]):
        send = list.append

    link, outputs = ScriptedLink(STEP, None, None, STEP, None), Outputs()
    worker = Worker(cast("CoreLink", link), time.time())
    worker._outputs = cast("OutputThread", outputs)
    with pytest.raises(StopRequested):
        worker._serve(Runner())
    assert len(outputs) == 2
    # After a step and while there is more, the wait is short; then it has no end until the next step.
    assert [timeout is None for timeout in link.timeouts] == [False, False, False, True, False, True]


def test_phases_count_from_the_engines_start() -> None:
    origin = time.time() - 5.0
    phases = Phases("worker-3", origin)
    phases.add("import", origin + 1.0)
    with phases.measure("load"):
        pass
    passed_s = time.time() - origin
    first, second = phases.rows
    assert (first.process, first.phase, second.phase) == ("worker-3", "import", "load")
    assert first.start_s == pytest.approx(1.0, abs=0.01)
    assert 4.0 - 0.01 <= first.seconds <= passed_s - 1.0 + 0.01
    assert second.start_s >= first.start_s + first.seconds - 0.01


def test_a_phase_that_fails_leaves_no_row() -> None:
    phases = Phases("worker-3", time.time())
    with pytest.raises(ValueError, match="broken"), phases.measure("load"):
        raise ValueError("broken")
    assert phases.rows == []


def test_the_engines_start_may_become_known_late() -> None:
    begun = time.time()
    phases = Phases("worker-0", begun)
    phases.add("import", begun)
    phases.count_from(begun - 5.0)
    phases.add("load", begun + 1.0)
    assert [row.start_s for row in phases.rows] == [pytest.approx(5.0), pytest.approx(6.0)]
