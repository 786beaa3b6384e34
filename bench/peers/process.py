"""The driver's side of a peer: its process, questions to it, and stopping it while others are measured."""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from bench.peers.catalog import last_line
from bench.peers.peer import Answer, PeerError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
_END_S = 20.0


class _LateError(PeerError):
    """Nothing came within the time that was given."""


class PeerProcess:
    """A worker that answers one question at a time.

    Between questions it is stopped with all its children (SIGSTOP), so that threads which spin, as some runtimes' do,
    take no core from the one that is measured.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None, log: pathlib.Path) -> None:
        """Starts it. `environment`: None takes this process's; `log`: what it writes to standard error."""
        self.started_at = time.perf_counter()
        self._log_path = log
        self._rest = b""
        self._given_up = ""  # why it is not asked any more
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._paused: list[psutil.Process] = []

    def wait_ready(self, timeout_s: float) -> str:
        """The peer's version, once it is open."""
        version: str = self._message(timeout_s)["version"]
        return version

    def ask(self, prompts: list[list[int]], num_tokens: int, timeout_s: float) -> Answer:
        """The peer's answer; it runs for as long as this call.

        One that is late is stopped for good: its answer, once it came, would be read as that to the next question.

        Raises:
            PeerError: it fails, ends, or takes longer than `timeout_s` seconds.
        """
        if self._given_up:
            raise PeerError(self._given_up)
        self.resume()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}).encode() + b"\n")
            self._process.stdin.flush()
            return Answer(**self._message(timeout_s))
        except BrokenPipeError:
            raise PeerError(self._end()) from None
        except _LateError as error:
            self._given_up = f"it was stopped, since an earlier question had {error}"
            self.stop()
            raise
        finally:
            self.pause()

    def pause(self) -> None:
        """Stops the process and all below it, the parent first, since it would miss its children."""
        if self._process.returncode is not None:  # its number may be another's by now
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            process.suspend()
            self._paused = [process, *process.children(recursive=True)]
        for each in self._paused[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()

    def resume(self) -> None:
        """Lets all that `pause` stopped go on, children first."""
        for each in reversed(self._paused):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
        self._paused = []

    def stop(self) -> None:
        """Ends the process and what it started; by force if its input's end is not enough."""
        self.resume()
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._process.pid).children(recursive=True)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()
        for each in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _message(self, timeout_s: float) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._line(timeout_s))
        if "error" in message:
            raise PeerError(message["error"])
        return message

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        until = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                raise _LateError(f"no answer after {timeout_s:.0f} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise PeerError(self._end())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        said = last_line(self._log_path.read_text(encoding="utf-8", errors="replace"))
        return f"it ended with exit code {self._process.returncode}; it said last: {said}"
