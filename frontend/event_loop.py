"""Runs a command's coroutine on uvloop until it is done, or a signal ends it in order."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

Result = TypeVar("Result")

_SHELL_SIGNAL_BASE = 128  # shells report 128 + the signal's number


def run_to_end(main: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result. From the main thread only.

    SIGTERM cancels it, as Ctrl-C does: an exception out of a plain signal handler would strike whatever the loop is
    doing, and leave a traceback of a task that nobody asked.

    Raises:
        SystemExit: it was ended by SIGTERM; 143.
        KeyboardInterrupt: it was ended by Ctrl-C.
    """
    before = signal.getsignal(signal.SIGTERM)
    terminated = False

    async def watched() -> Result:
        task = asyncio.current_task()
        assert task is not None, "a coroutine that a Runner runs is a task"

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        return await main

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(watched())
    except asyncio.CancelledError:
        if terminated:
            raise SystemExit(_SHELL_SIGNAL_BASE + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
