"""`folovllm serve` as a process, for the integration tests of the server."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import httpx
import psutil

from tests.integration.conftest import END_TIMEOUT_S, ROOT, TINY, kill_all, left_of

TIMEOUT_S = 60.0


class ServeProcess:
    """A running server.

    Attributes:
        url: where it serves, without a path behind it.
        lines: what it printed until it was ready.
    """

    def __init__(self, arguments: Sequence[str], *, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "folovllm", "serve", *arguments, "--port", "0"]
        # A file: a pipe that nobody reads would stop the server once it is full.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(os.environ) | (env or {}),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self.url = ""
        self.lines: list[str] = []

    @classmethod
    def of_model(cls, folder: pathlib.Path, *options: str, env: dict[str, str] | None = None) -> "ServeProcess":
        """Starts an engine of its own for the tiny model."""
        return cls([str(folder), *TINY, *options], env=env)

    def wait_ready(self) -> "ServeProcess":
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready; "):
                self.url = line.split()[1].removesuffix("/v1")
                return self
        raise AssertionError(f"the server ended: {self.errors()}")

    def errors(self) -> str:
        """What it has written to stderr, which has ended."""
        self.process.wait(END_TIMEOUT_S)
        self._errors.seek(0)
        return self._errors.read()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def outcome(self, family: Sequence[psutil.Process], timeout_s: float = END_TIMEOUT_S) -> tuple[int, str, int]:
        """Waits for the end: exit code, stderr, and how many of its processes outlived it."""
        self.process.communicate(timeout=timeout_s)
        return self.process.returncode, self.errors(), len(left_of(family))

    def end(self, number: int) -> tuple[int, str, int]:
        family = self.family()
        self.process.send_signal(number)
        return self.outcome(family)

    def close(self) -> None:
        """Ends whatever is left, for a test that failed half way."""
        if self.process.poll() is None:
            kill_all(self.family())
        self.process.communicate()
        self._errors.close()
