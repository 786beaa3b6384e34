"""Starts a core process with a fake worker and talks to it as its parent.

As a program, `python -m tests.fakes.fake_parent MODEL_DIR PHASE`, it brings a core as far as PHASE ("hello": no
configuration is sent, "configured", "ready"), prints one JSON line (`Started`) and waits to be killed.
"""

import os
import pathlib
import shutil
import signal
import sys
from types import TracebackType

import msgspec
import zmq

from folovllm.common.child_process import ChildProcess
from folovllm.common.config import EngineConfig
from folovllm.common.messages.lifecycle import ConfigureCore, CoreReady, CoreToParent, Failed, Hello, ParentToCore
from folovllm.common.transport import Decoder, bind, encode, make_runtime_dir, new_socket
from tests.fakes.fake_worker import SCRIPT_NAME, VOCAB_SIZE, Script, write_script

BOUND_MS = 30_000
_WORKER_MODULE = "tests.fakes.fake_worker"


class Started(msgspec.Struct, frozen=True):
    """What the program tells of the core it started."""

    core_pid: int
    runtime_dir: str
    endpoint: str


def make_model_dir(folder: pathlib.Path, script: Script, max_position_embeddings: int = 4096) -> pathlib.Path:
    """A folder with the config.json of a model that nobody loads, and the fake worker's script."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_position_embeddings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    write_script(folder, script)
    assert (folder / SCRIPT_NAME).exists()
    return folder


class FakeParent:
    """A core process and its parent's side; a context manager that stops the core."""

    def __init__(self, *, worker_module: str = _WORKER_MODULE) -> None:
        self.runtime_dir = make_runtime_dir(os.getpid())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self._context, zmq.ROUTER)
        endpoint, _ = bind(self._socket, f"ipc://{self.runtime_dir}/launch")
        self._decoder: Decoder[CoreToParent] = Decoder(CoreToParent)
        self._identity = b""
        self.endpoint = ""
        self.core = ChildProcess(
            "folovllm.core_proc", ["--connect", endpoint, "--name", "core", "--worker-module", worker_module], "core"
        )

    def __enter__(self) -> "FakeParent":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, config: EngineConfig, listen: str = "") -> CoreReady:
        """Configures the core and waits until it is ready."""
        self.configure(config, listen)
        message = self.receive()
        assert isinstance(message, CoreReady), message
        self.endpoint = message.endpoint
        return message

    def configure(self, config: EngineConfig, listen: str = "") -> None:
        hello = self.receive()
        assert isinstance(hello, Hello), hello
        self.send(ConfigureCore(config, str(self.runtime_dir), listen))

    def send(self, message: ParentToCore) -> None:
        self.send_raw(encode(message))

    def send_raw(self, frame: bytes) -> None:
        self._socket.send_multipart([self._identity, frame])

    def receive(self) -> CoreToParent:
        """The core's next message, also one that it sent before it ended."""
        assert self._socket.poll(BOUND_MS), f"no message; {self.core.exit_cause()}"
        self._identity, frame = self._socket.recv_multipart()
        return self._decoder.decode(frame)

    def failure(self) -> Failed:
        message = self.receive()
        assert isinstance(message, Failed), message
        return message

    def stop(self) -> int:
        """Ends the core in order; returns its exit code."""
        exit_code = self.core.stop(30.0)
        self._context.destroy(0)
        shutil.rmtree(self.runtime_dir, ignore_errors=True)
        return exit_code


def main() -> None:
    model_dir, phase = sys.argv[1:]
    parent = FakeParent()
    if phase == "hello":
        parent.receive()
    elif phase == "configured":
        parent.configure(EngineConfig(model=model_dir))
    elif phase == "ready":
        parent.start(EngineConfig(model=model_dir))
    started = Started(parent.core.pid, str(parent.runtime_dir), parent.endpoint)
    sys.stdout.buffer.write(msgspec.json.encode(started) + b"\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
