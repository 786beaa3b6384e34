"""The life of the worker process: configured, model loaded, loop, end; and what is told to the core when it fails.

The loop hands each step's result to the output thread before the device is done with it and goes on to the next step:
the main thread waits for steps, never for the device. torch is imported between the Hello and the configuration: what
the configuration waits for, such as the frontend's tokenizer, is loaded meanwhile.
"""

import os
from typing import Protocol

from folovllm.common.errors import FoloVLLMError, ProtocolError
from folovllm.common.kept_imports import kept_imports
from folovllm.common.log import get_logger, setup_logging
from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.common.stop_signals import StopRequested
from folovllm.worker_proc.core_link import CoreLink
from folovllm.worker_proc.output_thread import OutputThread, PendingOutput
from folovllm.worker_proc.phases import Phases

_OUTPUT_THREAD_BOUND_S = 1.0  # with the 0.5 s that frames linger, the grace of 1.5 s that a worker has to end

_IDLE_MS = 20  # without a step for so long, there is time for what later ones will want

logger = get_logger(__name__)


class Runner(Protocol):
    """What computes steps."""

    def execute(self, step: SchedulerOutput) -> PendingOutput: ...

    def prepare_ahead(self) -> bool:
        """Something that later steps will want; False if there is nothing."""
        ...


class Worker:
    """See the module's head. `started_at` is the process's begin, in seconds since 1970."""

    def __init__(self, link: CoreLink, started_at: float) -> None:
        self._link = link
        self._started_at = started_at
        self._outputs: OutputThread | None = None

    def run(self) -> int:
        """From the Hello to the last clean-up; returns the exit code."""
        exit_code = self._work()
        if self._outputs is not None and not self._outputs.close(_OUTPUT_THREAD_BOUND_S):
            logger.warning("the device does not answer; ending without it")
            os._exit(exit_code)  # closing the context would wait for the thread's socket, for ever
        self._link.close()
        return exit_code

    def _work(self) -> int:
        try:
            self._serve(self._start())
        except StopRequested as stop:
            logger.debug("%s", stop)
            return stop.exit_code
        except FoloVLLMError as error:  # its text says all there is to say, and the core will say it
            logger.info("%s: %s", type(error).__name__, error)
            self._link.report(error)
        except Exception as error:
            logger.exception("the worker failed")
            self._link.report(error)
        return 1

    def _start(self) -> Runner:
        self._link.say_hello()
        phases = Phases(self._link.name, self._started_at)
        phases.add("import, connect", self._started_at)
        with phases.measure("import torch"), kept_imports():
            from folovllm.worker_proc.startup import Startup
        configure = self._link.await_configuration()
        setup_logging(self._link.name, configure.config.log_level)
        phases.count_from(configure.started_at or self._started_at)
        runner, ready = Startup(configure, phases, self._link.check_stop).run()
        self._outputs = OutputThread(self._link.context, self._link.endpoint, self._link.name)
        self._link.watch(self._outputs.sentinel, self._outputs.raise_failure)
        self._link.send(ready)
        return runner

    def _serve(self, runner: Runner) -> None:
        assert self._outputs is not None
        is_more_to_prepare = True
        while True:
            step = self._link.receive_step(_IDLE_MS if is_more_to_prepare else None)
            if step is None:
                is_more_to_prepare = prepare_ahead(runner)
            else:
                self._outputs.send(execute(runner, step))
                is_more_to_prepare = True


class Answer:
    """A result that is known already, in its place among those that are not."""

    def __init__(self, message: ModelRunnerOutput) -> None:
        self.step_id = message.step_id
        self._message = message

    def wait(self) -> ModelRunnerOutput:
        return self._message


def execute(runner: Runner, step: SchedulerOutput) -> PendingOutput:
    """Computes one step. Whatever goes wrong in it is the step's result; the worker goes on."""
    try:
        return runner.execute(step)
    except ProtocolError as error:
        logger.error("step %d refused: %s", step.step_id, error)
        text = f"{type(error).__name__}: {error}"
    except Exception as error:
        logger.exception("step %d failed", step.step_id)
        text = f"{type(error).__name__}: {error}"
    return Answer(ModelRunnerOutput(step.step_id, error=text))


def prepare_ahead(runner: Runner) -> bool:
    """Lets the runner do something that later steps will want; False if there is nothing more of it, or it failed."""
    try:
        return runner.prepare_ahead()
    except Exception:
        logger.exception("what steps will want could not be prepared")
        return False
