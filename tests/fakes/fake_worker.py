"""A worker without a model: it speaks the worker's protocol, and its tokens follow from the tokens before them.

    python -m tests.fakes.fake_worker --connect ENDPOINT --name worker-0 --death-fd N

What it does is told by `fake_worker.json` in the model's folder (`Script`). It keeps a cache of tokens by block, writes
into it as steps say and reads a sequence back from its blocks before each sampled token, so that any mistake in blocks,
slots, copies or order ends in an error instead of a plausible token.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterable
from types import TracebackType

import msgspec
import numpy as np
import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.messages.core_worker import (
    CoreToWorker,
    ModelRunnerOutput,
    NewRequest,
    SamplingRow,
    SchedulerOutput,
)
from folovllm.common.messages.lifecycle import (
    PROTOCOL_VERSION,
    BadFrame,
    ConfigureWorker,
    Failed,
    Hello,
    MemoryUse,
    PhaseTime,
    WorkerReady,
)
from folovllm.common.transport import Decoder, connect, encode, new_socket
from tests.fakes.simulated_grammar import masked

SCRIPT_NAME = "fake_worker.json"
VOCAB_SIZE = 1000
_BOUND_MS = 30_000


class Script(msgspec.Struct, frozen=True):
    """What a fake worker does.

    Attributes:
        num_blocks: KV blocks it claims to have, block 0 included.
        stop_before: "": it becomes ready; "hello", "ready": it goes silent before this message.
        fail: text of a Failed that it sends instead of becoming ready.
        control: endpoint of a test that steps are passed on to and that answers for it; "" answers at once.
        die_at: each worker's step, counted from 0, at which it ends with exit code 9 instead of an answer; -1: none.
        poison: whoever has this token is the end of every worker that computes it; -1: none is.
        check: False: constant tokens without any book-keeping, as fast as Python can.
    """

    num_blocks: int = 64
    stop_before: str = ""
    fail: str = ""
    control: str = ""
    die_at: int = -1
    poison: int = -1
    check: bool = True


def write_script(model_dir: pathlib.Path, script: Script) -> None:
    (model_dir / SCRIPT_NAME).write_bytes(msgspec.json.encode(script))


def next_token(token_ids: Iterable[int], sampling: SamplingRow) -> int:
    """The token that follows: any other history, seed or sample index gives, as a rule, another one."""
    value = sampling.seed % 997 + 31 * sampling.sample_index
    for token_id in token_ids:
        value = (value * 33 + token_id + 1) % 65_521
    return value % VOCAB_SIZE


def expected_output(prompt: list[int], num_tokens: int, sampling: SamplingRow) -> list[int]:
    """What a request gets that no stop token ends."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, sampling))
    return tokens[len(prompt) :]


class _Row:
    """One slot."""

    def __init__(self, new: NewRequest) -> None:
        self.tokens = ints(new.token_ids)
        self.num_computed = new.num_computed_tokens
        self.block_ids = ints(new.block_ids)
        self.sampling = new.sampling


class FakeModel:
    """Executes steps, or raises AssertionError where a step cannot be what the scheduler meant."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rows: dict[int, _Row] = {}
        self._cache: dict[tuple[int, int], int] = {}  # (block, offset) → token
        self._next_step_id: int | None = None

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        assert step.step_id == (step.step_id if self._next_step_id is None else self._next_step_id), "steps in order"
        self._next_step_id = step.step_id + 1
        self._apply(step)
        slots = ints(step.slots)
        assert len(set(slots)) == len(slots), "a slot is scheduled once"
        counts = ints(step.num_scheduled_tokens)
        counts = [1] * (len(slots) - len(counts)) + counts
        masks = _masks(step)
        sampled = [
            token
            for slot, count in zip(slots, counts, strict=True)
            if (token := self._compute(slot, count, masks.pop(slot, None))) >= 0
        ]
        assert not masks, "a mask for a slot that does not sample"
        return ModelRunnerOutput(step.step_id, int32_bytes(sampled))

    def _apply(self, step: SchedulerOutput) -> None:
        for new in step.new_requests:
            self._rows[new.slot] = _Row(new)
        for slot, block in zip(ints(step.append_slots), ints(step.append_block_ids), strict=True):
            self._rows[slot].block_ids.append(block)
        copies = ints(step.block_copies)
        for source, destination in zip(copies[::2], copies[1::2], strict=True):
            for offset in range(self._block_size):
                self._cache[destination, offset] = self._cache.get((source, offset), -1)

    def _compute(self, slot: int, count: int, mask: bytes | None) -> int:
        """Writes the tokens into the cache; returns the sampled token, -1 where more of the prompt is to come."""
        row = self._rows[slot]
        end = row.num_computed + count
        assert end <= len(row.tokens), f"slot {slot}: {end} tokens to compute, {len(row.tokens)} known"
        for position in range(row.num_computed, end):
            self._cache[self._place(row, position)] = row.tokens[position]
        row.num_computed = end
        if end < len(row.tokens):
            return -1
        cached = [self._cache.get(self._place(row, position), -1) for position in range(end)]
        assert cached == row.tokens, f"slot {slot}: its blocks hold {cached}, its tokens are {row.tokens}"
        token_id = next_token(row.tokens, row.sampling)
        row.tokens.append(token_id if mask is None else masked(token_id, mask))
        return row.tokens[-1]

    def _place(self, row: _Row, position: int) -> tuple[int, int]:
        block = row.block_ids[position // self._block_size]
        assert block > 0, "block 0 is never handed out"
        return block, position % self._block_size


def _masks(step: SchedulerOutput) -> dict[int, bytes]:
    """slot → its token mask."""
    slots, size = ints(step.masked_slots), -(-VOCAB_SIZE // 32) * 4
    assert len(step.token_masks) == len(slots) * size
    return {slot: step.token_masks[row * size : (row + 1) * size] for row, slot in enumerate(slots)}


class FastModel:
    """Answers with one constant token for each sampling slot; for measuring the core alone."""

    def __init__(self) -> None:
        self._missing: dict[int, int] = {}  # slot → prompt tokens still to come

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        num_tokens = len(step.slots) // 4
        if step.new_requests or step.num_scheduled_tokens:
            num_tokens = self._count_sampling(step)
        return ModelRunnerOutput(step.step_id, b"\x07\x00\x00\x00" * num_tokens)

    def _count_sampling(self, step: SchedulerOutput) -> int:
        for new in step.new_requests:
            self._missing[new.slot] = len(new.token_ids) // 4 - new.num_computed_tokens
        counts = ints(step.num_scheduled_tokens)
        slots = ints(step.slots)
        counts = [1] * (len(slots) - len(counts)) + counts
        num_sampling = 0
        for slot, count in zip(slots, counts, strict=True):
            self._missing[slot] = max(self._missing[slot] - count, 0)
            num_sampling += self._missing[slot] == 0
        return num_sampling


class FakeWorker:
    """Hello, ready, then one answer for each step, until the parent is gone."""

    def __init__(self, endpoint: str, name: str, watch: ParentWatch | None) -> None:
        self._name = name
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._main = self._dial(endpoint, name.encode())
        self._out = self._dial(endpoint, f"{name}/out".encode())
        self._decoder: Decoder[CoreToWorker] = Decoder(CoreToWorker)
        self._poller = zmq.Poller()
        self._poller.register(self._main, zmq.POLLIN)
        self._watch_fd = -1 if watch is None else watch.fd
        if watch is not None:
            self._poller.register(watch.fd, zmq.POLLIN)

    def run(self) -> int:
        self._main.send(encode(Hello("worker", PROTOCOL_VERSION, os.getpid(), self._name)))
        configure = self._next_message()
        if not isinstance(configure, ConfigureWorker):
            return 0 if configure is None else 1
        script = msgspec.json.decode((pathlib.Path(configure.config.model) / SCRIPT_NAME).read_bytes(), type=Script)
        if script.fail:
            self._main.setsockopt(zmq.LINGER, 1000)
            self._main.send(encode(Failed(self._name, "ModelError", script.fail, "Traceback: ...")))
            self._context.destroy(1000)
            return 1
        if script.stop_before == "ready":
            return self._stay_silent()
        self._main.send(encode(_ready(script.num_blocks)))
        if script.control:
            return self._relay(script.control)
        model = FakeModel(configure.config.block_size) if script.check else FastModel()
        num_steps = 0
        while (message := self._next_message()) is not None:
            if isinstance(message, SchedulerOutput):
                if num_steps == script.die_at or _is_poisoned(message, script.poison):
                    self._context.destroy(1000)  # what was answered arrives
                    os._exit(9)
                self._out.send(encode(model.execute(message)))
                num_steps += 1
        return 0

    def _dial(self, endpoint: str, identity: bytes) -> "zmq.Socket[bytes]":
        socket = new_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        connect(socket, endpoint)
        return socket

    def _next_message(self) -> CoreToWorker | None:
        """The core's next message, None when the parent is gone."""
        ready = dict(self._poller.poll())
        return None if self._watch_fd in ready else self._decoder.decode(self._main.recv())

    def _stay_silent(self) -> int:
        while self._next_message() is not None:
            pass
        return 0

    def _relay(self, control: str) -> int:
        """Passes the core's frames on to a test; what it sends, (whose, frame), goes to the core as it is."""
        test = self._context.socket(zmq.DEALER)
        test.linger = 0
        test.connect(control)
        self._poller.register(test, zmq.POLLIN)
        senders = {b"main": self._main, b"out": self._out}
        while self._watch_fd not in (ready := dict(self._poller.poll())):
            if self._main in ready:
                test.send(self._main.recv())
            if test in ready:
                whose, *frames = test.recv_multipart()
                if whose == b"exit":
                    os._exit(int(frames[0]))
                senders[whose].send_multipart(frames)
        return 0


class WorkerControl:
    """A test's end of the relay: what the core sends to the worker comes here, and the test answers."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)  # no PAIR: that stays with its first peer, who may end
        self.endpoint = f"ipc://{folder}/control"
        self._socket.bind(self.endpoint)
        self._decoder: Decoder[CoreToWorker] = Decoder(CoreToWorker)
        self.bad_frames: list[str] = []

    def __enter__(self) -> "WorkerControl":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(0)

    def next_step(self) -> SchedulerOutput:
        """The next step; refusals that come before it are kept in `bad_frames`."""
        while True:
            message = self.receive()
            if isinstance(message, SchedulerOutput):
                return message

    def receive(self) -> CoreToWorker:
        assert self._socket.poll(_BOUND_MS), "the core sends nothing to its worker"
        message = self._decoder.decode(self._socket.recv())
        if isinstance(message, BadFrame):
            self.bad_frames.append(message.reason)
        return message

    def answer(self, output: ModelRunnerOutput) -> None:
        self.send_raw(b"out", encode(output))

    def send_raw(self, whose: bytes, *frames: bytes) -> None:
        """Sends frames as the worker's `main` or `out` connection; `exit` ends its process with a code."""
        self._socket.send_multipart([whose, *frames])


def _is_poisoned(step: SchedulerOutput, poison: int) -> bool:
    return any(poison in ints(new.token_ids) for new in step.new_requests)


def _ready(num_blocks: int) -> WorkerReady:
    return WorkerReady(
        num_blocks=num_blocks,
        device="fake",
        dtype="float32",
        attention_backend="fake",
        phases=[PhaseTime("worker-0", "pretend to load", 0.0, 0.0)],
        memory=[MemoryUse("weights", 123)],
    )


def ints(field: bytes) -> list[int]:
    return np.frombuffer(field, "<i4").tolist()  # type: ignore[no-any-return]


def int32_bytes(values: Iterable[int]) -> bytes:
    return np.fromiter(values, "<i4").tobytes()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--death-fd", type=int)
    options = parser.parse_args()
    watch = ParentWatch(options.death_fd, 1.0, lambda: None) if options.death_fd is not None else None
    return FakeWorker(options.connect, options.name, watch).run()


if __name__ == "__main__":
    sys.exit(main())
