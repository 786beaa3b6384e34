"""Child processes that die with their parent, and parents that learn of a death at once.

The parent holds the writing end of a pipe, the *death pipe*; the child inherits the reading end. The parent's end, by
whatever cause, closes the pipe, and the child's watch sees end-of-file: it ends the child, in order while the main
loop answers, by force after a grace. Through the pipe a parent also stops a child on purpose, so there is one way to
stop and it is exercised at every exit; it then writes a byte before it closes the pipe, since a fork of the parent that
lives on keeps the pipe open. What has arrived is never read, so that all who watch the pipe see it. A worker also asks
the kernel to kill it with its parent (PR_SET_PDEATHSIG), since a long call into a device driver can keep Python's watch
thread from running.

The child is started from a thread that lives until the child has ended: the kernel ties PR_SET_PDEATHSIG to the
*thread* that started the child, and the same thread waits for the child, so that its end is known at once.
"""

import contextlib
import ctypes
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import folovllm
from folovllm.common.config import child_environment

_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """A running child, made by `ChildProcess(module, arguments, name)`.

    `sentinel` is a file descriptor that becomes readable when the child has ended, for use in a poller.
    """

    def __init__(self, module: str, arguments: Sequence[str], name: str) -> None:
        """Starts `python -m module arguments --death-fd N`. Raises OSError where the system cannot start it."""
        self.name = name
        death_read, self._death_write = os.pipe()
        self.sentinel, sentinel_write = os.pipe()
        command = [sys.executable, "-P", "-m", module, *arguments, "--death-fd", str(death_read)]
        started = threading.Event()
        outcome: list[subprocess.Popen[bytes] | Exception] = []

        def run() -> None:
            try:
                outcome.append(_start(command, death_read))
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits for it
                outcome.append(error)
            os.close(death_read)
            started.set()
            if isinstance(outcome[0], subprocess.Popen):
                outcome[0].wait()
            os.close(sentinel_write)

        self._thread = threading.Thread(target=run, name=f"wait-{name}", daemon=True)
        self._thread.start()
        started.wait()
        if isinstance(outcome[0], Exception):
            self._thread.join()
            self.close()
            raise outcome[0]
        self._process = outcome[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """The child's exit code, minus the signal's number if one killed it; None while it runs."""
        return self._process.returncode

    def exit_cause(self) -> str:
        """The child's end in words, such as "core (pid 12) was killed by SIGKILL"."""
        code = self.exit_code()
        who = f"{self.name} (pid {self.pid})"
        if code is None:
            return f"{who} is running"
        if code < 0:
            return f"{who} was killed by {_signal_name(-code)}"
        return f"{who} ended with exit code {code}"

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the child's end, without a time-out for ever; False if it still runs after `timeout_s` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def ask_to_stop(self) -> None:
        """Writes to the death pipe and closes it: the child ends by itself. May be called again."""
        if self._death_write >= 0:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                os.write(self._death_write, b"x")
            os.close(self._death_write)
            self._death_write = -1

    def kill(self) -> None:
        """Sends SIGKILL and does not wait; nothing if the child has ended."""
        self._process.kill()

    def stop(self, grace_s: float) -> int:
        """Stops the child: by request, after `grace_s` seconds by SIGKILL. Returns its exit code."""
        self.ask_to_stop()
        if not self.wait(grace_s):
            self._process.kill()
            self._thread.join()
        self.close()
        return self._process.returncode

    def close(self) -> None:
        """Releases the descriptors of a child that has ended."""
        self.ask_to_stop()
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1


def _signal_name(number: int) -> str:
    """Such as SIGKILL; a real-time signal has a name relative to the first one, as `kill -l` shows it."""
    known = {member.value: member.name for member in signal.Signals}
    if number in known:
        return known[number]
    return f"SIGRTMIN+{number - signal.SIGRTMIN}" if signal.SIGRTMIN < number < signal.SIGRTMAX else f"signal {number}"


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m module arguments` in the foreground, with this process's output; returns its exit code."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, env=child_environment(_package_parent()), check=False).returncode


def _package_parent() -> str:
    return str(pathlib.Path(folovllm.__file__).resolve().parent.parent)


def _start(command: list[str], death_read: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the parent's stdout belongs to the user's program
        pass_fds=(death_read,),
        env=child_environment(_package_parent()),
        start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone, which then stops its children
    )


class ParentWatch:
    """The child's side of the death pipe. `fd` becomes readable, and stays so, when the parent ends or wants the end.

    Start it on the first line of `main`. The main loop polls `fd` and ends in order; if the process is still there
    `grace_s` seconds later, the watch thread calls `last_will` and ends it.
    """

    def __init__(self, death_fd: int, grace_s: float, last_will: Callable[[], None]) -> None:
        self.fd = death_fd
        self._grace_s = grace_s
        self._last_will = last_will
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def set_last_will(self, last_will: Callable[[], None]) -> None:
        """Replaces what is done before a forced end, once it is known what there is to clean up."""
        self._last_will = last_will

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll()
        time.sleep(self._grace_s)  # the main thread is cleaning up; if it ends in time, this thread goes with it
        self._last_will()
        os._exit(0)


def die_with_parent_thread() -> None:
    """Asks Linux to kill this process when the thread that started it ends (PR_SET_PDEATHSIG); elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
