"""Starts the core as a child process, waits until it serves, and leaves nothing behind when it ends.

The order is: a runtime folder of the engine's own, a launch socket in it, the child; the child says Hello, is told its
configuration and reports CoreReady or Failed. Between Hello and the configuration the parent has time to load what it
needs itself (the tokenizer), so the two starts overlap. The launch socket stays open: a core that fails later says why
on it.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import zmq

from folovllm.common.child_process import ChildProcess
from folovllm.common.config import EngineConfig
from folovllm.common.errors import EngineDeadError, EngineStartError, ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.lifecycle import (
    PROTOCOL_VERSION,
    BadFrame,
    ConfigureCore,
    CoreReady,
    CoreToParent,
    Failed,
    Hello,
)
from folovllm.common.transport import Decoder, bind, encode, is_served, make_runtime_dir, new_socket, remove_socket_file

_CORE_MODULE = "folovllm.core_proc"
_STOP_GRACE_S = 4.0  # longer than the core takes to end itself by force (3.5 s), so that its files go with it
logger = get_logger(__name__)


class ChildTraceback(Exception):
    """The traceback of another process, shown as the cause of the error that this process raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class EngineProcess:
    """A core that this process started. `stop()` ends it; so does the end of this process, by whatever cause."""

    def __init__(self, module: str = _CORE_MODULE) -> None:
        """Starts `python -m module`; `wait_ready` tells it what to be. Raises EngineStartError."""
        self._resources = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, close_in_owner, self._resources, os.getpid())
        try:
            self._start(module)
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise EngineStartError(f"cannot start the core process: {error}") from error
            raise

    def _start(self, module: str) -> None:
        sweep_stale_runtime_dirs()
        self.runtime_dir = make_runtime_dir(os.getpid())
        self._resources.callback(shutil.rmtree, self.runtime_dir, ignore_errors=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._resources.callback(context.term)
        self._launch = new_socket(context, zmq.ROUTER)
        self._resources.callback(self._launch.close)
        endpoint, _ = bind(self._launch, f"ipc://{self.runtime_dir}/launch")
        self._decoder: Decoder[CoreToParent] = Decoder(CoreToParent)
        self._child = _spawn(module, ["--connect", endpoint, "--name", "core"])
        self._resources.callback(self._child.stop, _STOP_GRACE_S)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the core has ended; -1 after `stop`."""
        return self._child.sentinel

    def wait_for_end(self, bound_s: float | None = None) -> None:
        """Returns when the core has ended, or after `bound_s` seconds."""
        self._child.wait(bound_s)

    def wait_ready(self, config: EngineConfig, *, listen: str = "", started_at: float = 0.0) -> CoreReady:
        """Sends the configuration once the core asks for it, and waits until it serves.

        There is no time limit, since loading a large model takes what it takes; a core that ends is noticed at once.

        Args:
            config: the engine's options.
            listen: where frontends are served; "" chooses an endpoint in the runtime folder.
            started_at: when the start began (seconds since the epoch): what the phases in CoreReady count from.

        Raises:
            EngineStartError: the cause that the failing process reported, its traceback as `__cause__`.
        """
        while True:
            identity, message = self._receive()
            if isinstance(message, CoreReady):
                self._resources.callback(_remove_left_socket_file, message.endpoint)
                return message
            if isinstance(message, Failed):
                raise EngineStartError(_cause(message)) from ChildTraceback(message.traceback)
            if isinstance(message, BadFrame):
                raise EngineStartError(f"the core refused its configuration: {message.reason}")
            self._configure(identity, message, ConfigureCore(config, str(self.runtime_dir), listen, started_at))

    def _configure(self, identity: bytes, hello: Hello, configuration: ConfigureCore) -> None:
        if hello.role != "core" or hello.protocol != PROTOCOL_VERSION:
            raise EngineStartError(
                f"{hello.name} says it is a {hello.role} that speaks protocol {hello.protocol}; expected a core that "
                f"speaks {PROTOCOL_VERSION}"
            )
        self._launch.send_multipart([identity, encode(configuration)])

    def _receive(self) -> tuple[bytes, CoreToParent]:
        poller = zmq.Poller()
        poller.register(self._launch, zmq.POLLIN)
        poller.register(self.sentinel, zmq.POLLIN)
        while True:
            poller.poll()
            message = self._receive_now()
            if message is not None:
                return message
            if self._child.exit_code() is not None:
                raise EngineStartError(f"{self._child.exit_cause()} before it was ready")

    def _receive_now(self) -> tuple[bytes, CoreToParent] | None:
        """The next valid message that is there, None if there is none."""
        while True:
            try:
                identity, frame = self._launch.recv_multipart(zmq.NOBLOCK)
                return identity, self._decoder.decode(frame)
            except zmq.Again:
                return None
            except (ProtocolError, ValueError) as error:
                logger.error("the core sent a frame that was refused: %s", error)

    def failure(self) -> EngineDeadError | None:
        """What ended the core, in its own words where it found the time to say them; None while it runs."""
        if not self._finalizer.alive:
            return EngineDeadError("the engine was stopped")
        if self._child.exit_code() is None:
            return None
        while (received := self._receive_now()) is not None:
            if isinstance(received[1], Failed):
                error = EngineDeadError(_cause(received[1]))
                error.__cause__ = ChildTraceback(received[1].traceback)
                return error
        return EngineDeadError(f"the engine is gone: {self._child.exit_cause()}")

    def stop(self) -> None:
        """Ends the core in order, after a grace by force, and removes the runtime folder. May be called again."""
        self._finalizer()


class _Closable(Protocol):
    def close(self) -> None: ...


def close_in_owner(resources: _Closable, owner: int) -> None:
    """What finalizers call: in a fork of the process `owner`, the resources are another's and stay."""
    if os.getpid() == owner:
        resources.close()


def _cause(failed: Failed) -> str:
    return f"{failed.error_type} in {failed.process}: {failed.message}"


def _spawn(module: str, arguments: list[str]) -> ChildProcess:
    """Starts the child in a thread: KeyboardInterrupt reaches the main thread only, so no child is lost half made."""
    outcome: list[ChildProcess | OSError] = []

    def start() -> None:
        try:
            outcome.append(ChildProcess(module, arguments, "core"))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=start, name="start-core")
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()
        if isinstance(outcome[0], ChildProcess):
            outcome[0].stop(_STOP_GRACE_S)
        raise
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def sweep_stale_runtime_dirs(is_alive: Callable[[int], bool] | None = None) -> None:
    """Removes this user's runtime folders whose engine was killed before it could.

    A folder is stale if no process has its number *and* nobody listens on its sockets: a container that shares the
    folder for temporary files has process numbers of its own.
    """
    alive = is_alive or _is_alive
    for base in {pathlib.Path(tempfile.gettempdir()), pathlib.Path("/tmp")}:
        for folder in base.glob("folovllm-*-*"):
            pid = folder.name.split("-")[1]
            with contextlib.suppress(OSError):  # removed by another sweep meanwhile
                if pid.isdecimal() and folder.lstat().st_uid == os.getuid() and not alive(int(pid)):
                    _remove_unless_in_use(folder)


def _remove_unless_in_use(folder: pathlib.Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(is_served(str(path)) for path in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_socket_file(endpoint: str) -> None:
    """For a core that was killed; else it has removed the file itself, and another may listen there by now."""
    if endpoint.startswith("ipc://") and not is_served(endpoint):
        remove_socket_file(endpoint)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
