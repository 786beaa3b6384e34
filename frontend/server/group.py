"""Several server processes on one port, over one engine.

The parent starts the engine, or is told where one listens, and holds the port with a socket that is bound but does not
listen. Each child (`python -m folovllm.frontend.server`) binds a socket of its own to the port; the kernel spreads the
connections. The children end with the parent, and a child's end ends all.

What the children need is in a folder that only this user can read: their options, API keys among them, and the files
through which their metrics add up.
"""

import contextlib
import os
import pathlib
import select
import shutil
import socket
import tempfile
from collections.abc import Callable

import msgspec

from folovllm.common.child_process import ChildProcess
from folovllm.common.errors import EngineDeadError, EngineStartError
from folovllm.common.log import get_logger
from folovllm.frontend.engine_process import EngineProcess
from folovllm.frontend.server.options import ServerOptions

logger = get_logger(__name__)

_CHILD_MODULE = "folovllm.frontend.server"
_GRACE_S = 10.0  # beyond the drain time-out, for a child to end in order; then it ends itself by force
_READY_POLL_MS = 50
_ENDING_S = 2.0  # what that takes it


class ChildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one child is told.

    Attributes:
        server: options of the server; the port is the one that the parent holds.
        engine: where the engine listens.
        tokenizer: as for AsyncLLM.
        log_level: of the child's log lines.
        folder: where a child reports that it serves (`ready-N`), and where metrics add up.
    """

    server: ServerOptions
    engine: str
    tokenizer: str | None
    log_level: str
    folder: str


class ServerGroup:
    """The running children. `close` ends them; so does the end of this process."""

    def __init__(
        self, options: ServerOptions, bound: socket.socket, engine: str, *, tokenizer: str | None, log_level: str
    ) -> None:
        """Starts the children. Raises EngineStartError where the system cannot.

        Args:
            options: of the server.
            bound: what holds the port.
            engine: where the engine listens.
            tokenizer, log_level: as in ChildOptions.
        """
        self._stack = contextlib.ExitStack()
        self._grace_s = options.drain_timeout_s + _GRACE_S
        self._children: list[ChildProcess] = []
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="folovllm-serve-"))
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        told = ChildOptions(
            server=msgspec.structs.replace(options, port=bound.getsockname()[1]),
            engine=engine,
            tokenizer=tokenizer,
            log_level=log_level,
            folder=str(self._folder),
        )
        path = self._folder / "options.json"
        path.touch(0o600)
        path.write_bytes(msgspec.json.encode(told))
        try:
            for i in range(options.api_server_count):
                arguments = ["--options", str(path), "--number", str(i), "--grace", str(self._grace_s)]
                self._children.append(ChildProcess(_CHILD_MODULE, arguments, f"server-{i}"))
        except OSError as error:
            self.close()
            raise EngineStartError(f"cannot start a server process: {error}") from error

    def run(self, engine: EngineProcess | None, on_ready: Callable[[], None]) -> None:
        """Waits for the end of a child, or of the engine, which it raises as EngineDeadError.

        Args:
            engine: the engine's process, if it is this process's own child.
            on_ready: called when every child serves.
        """
        poller = select.poll()
        for descriptor in [child.sentinel for child in self._children] + ([engine.sentinel] if engine else []):
            poller.register(descriptor, select.POLLIN)
        told = False
        while not poller.poll(None if told else _READY_POLL_MS):
            if not told and len(list(self._folder.glob("ready-*"))) == len(self._children):
                told = True
                on_ready()
        if engine is not None and (failure := engine.failure()) is not None:
            raise failure
        ended = next(child for child in self._children if child.exit_code() is not None)
        raise EngineDeadError(f"{ended.exit_cause()}; its log lines say why")

    def close(self) -> None:
        """Lets all children drain at once, and ends them."""
        for child in self._children:
            child.ask_to_stop()
        for child in self._children:
            child.stop(self._grace_s + _ENDING_S)
        self._stack.close()


def report_ready(folder: str, number: int) -> None:
    """A child tells its parent that it serves."""
    descriptor = os.open(pathlib.Path(folder) / f"ready-{number}", os.O_CREAT | os.O_WRONLY, 0o600)
    os.close(descriptor)
