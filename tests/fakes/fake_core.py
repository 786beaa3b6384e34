"""A core without a scheduler: starts one real worker, speaks its protocol to it, and lets a test write the steps.

In a test it is an object (`FakeCore`). As a program, `python -m tests.fakes.fake_core MODEL_FOLDER PHASE`, it is the
worker's parent in a process that a test can kill: it prints the worker's process id once the worker has reached PHASE
("hello", "loading" or "ready") and then only waits.
"""

import argparse
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import zmq

from folovllm.common.child_process import ChildProcess
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import (
    CoreToWorker,
    ModelRunnerOutput,
    NewRequest,
    SamplingRow,
    SchedulerOutput,
    WorkerToCore,
)
from folovllm.common.messages.lifecycle import ConfigureWorker, Hello, WorkerReady
from folovllm.common.transport import Decoder, bind, encode, new_socket

NAME = "worker-0"
BOUND_S = 60.0
MAX_MODEL_LEN = 64
BLOCK_SIZE = 4

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def write_config(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A model folder of a config.json alone, for dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(msgspec.json.encode(_CONFIG | changes))
    return folder


def engine_config(folder: pathlib.Path, **changes: object) -> EngineConfig:
    fields: dict[str, object] = {
        "model": str(folder),
        "device": "cpu",
        "load_format": "dummy",
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 65,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "cpu_threads": 1,
    }
    return msgspec.convert(fields | changes, EngineConfig)


class FakeCore:
    """Binds, starts a worker and receives from it; every wait is bounded."""

    def __init__(self, runtime_dir: pathlib.Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = new_socket(self._context, zmq.ROUTER)
        endpoint, _ = bind(self.socket, f"ipc://{runtime_dir}/worker")
        self._decoder: Decoder[WorkerToCore] = Decoder(WorkerToCore)
        self.worker = ChildProcess("folovllm.worker_proc", ["--connect", endpoint, "--name", NAME], NAME)

    def receive(self, bound_s: float = BOUND_S) -> tuple[bytes, WorkerToCore]:
        """The next message and its sender's identity."""
        if not self.socket.poll(int(bound_s * 1000)):
            raise TimeoutError(f"nothing came within {bound_s} s; {self.worker.exit_cause()}")
        identity, frame = self.socket.recv_multipart()
        return identity, self._decoder.decode(frame)

    def expect_hello(self) -> Hello:
        identity, hello = self.receive()
        assert isinstance(hello, Hello)
        assert identity == NAME.encode()
        return hello

    def expect_output(self) -> ModelRunnerOutput:
        identity, output = self.receive()
        assert isinstance(output, ModelRunnerOutput), output
        assert identity == f"{NAME}/out".encode()
        return output

    def start(self, config: EngineConfig) -> WorkerReady:
        """Brings the worker from its Hello to its readiness."""
        self.expect_hello()
        self.send(ConfigureWorker(config, 0, MAX_MODEL_LEN))
        _, ready = self.receive()
        assert isinstance(ready, WorkerReady), ready
        return ready

    def send(self, message: CoreToWorker) -> None:
        self.send_frames(encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart([NAME.encode(), *frames])

    def step(self, step: SchedulerOutput) -> list[int]:
        """Sends a step, waits for its result and returns the tokens."""
        self.send(step)
        output = self.expect_output()
        assert output.step_id == step.step_id
        assert not output.error, output.error
        return ints(output.token_ids)

    def close(self) -> None:
        if self.worker.sentinel >= 0:
            self.worker.stop(30.0)
        self.socket.close()
        self._context.term()


@contextmanager
def running_core() -> Iterator[FakeCore]:
    """A FakeCore with a socket folder of its own; both are gone afterwards, and so is the worker."""
    runtime_dir = pathlib.Path(tempfile.mkdtemp(prefix="fakecore-", dir="/tmp"))
    core = FakeCore(runtime_dir)
    try:
        yield core
    finally:
        core.close()
        shutil.rmtree(runtime_dir)


def new_request(
    slot: int, tokens: list[int], blocks: list[int], sampling: SamplingRow | None = None, **fields: int
) -> NewRequest:
    """A request whose tokens are all prompt and none computed, unless `fields` says otherwise."""
    counts = {"num_prompt_tokens": len(tokens), "num_computed_tokens": 0} | fields
    return NewRequest(
        slot=slot,
        token_ids=int32(tokens),
        num_prompt_tokens=counts["num_prompt_tokens"],
        num_computed_tokens=counts["num_computed_tokens"],
        block_ids=int32(blocks),
        sampling=SamplingRow() if sampling is None else sampling,
    )


def int32(values: Iterable[int]) -> bytes:
    return np.array(list(values), "<i4").tobytes()


def ints(field: bytes) -> list[int]:
    values: list[int] = np.frombuffer(field, "<i4").tolist()
    return values


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("phase", choices=("hello", "loading", "ready"))
    options = parser.parse_args()
    with running_core() as core:
        core.expect_hello()
        if options.phase != "hello":
            core.send(ConfigureWorker(engine_config(options.folder), 0, MAX_MODEL_LEN))
        if options.phase == "ready":
            core.receive()
        print(core.worker.pid, flush=True)
        core.receive(10 * BOUND_S)


if __name__ == "__main__":
    main()
