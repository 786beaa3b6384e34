"""The output thread: order, faults of the device, its end."""

import os
import pathlib
import select
import shutil
import tempfile
import threading
from collections.abc import Iterator

import pytest
import zmq

from folovllm.common.errors import EngineError
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.common.messages.lifecycle import BadFrame
from folovllm.common.transport import Decoder, bind, encode, new_socket
from folovllm.worker_proc.output_thread import OutputThread

BOUND_S = 30.0


class Pending:
    """A result that is there once the test says so."""

    def __init__(self, step_id: int, error: Exception | None = None) -> None:
        self.step_id = step_id
        self.there = threading.Event()
        self._error = error

    def wait(self) -> ModelRunnerOutput:
        assert self.there.wait(BOUND_S)
        if self._error is not None:
            raise self._error
        return ModelRunnerOutput(self.step_id, b"\x01\x00\x00\x00")


class Peer:
    """The core's end of the connection."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = new_socket(self.context, zmq.ROUTER)
        self.endpoint, _ = bind(self.socket, f"ipc://{folder}/worker")
        self._decoder: Decoder[ModelRunnerOutput] = Decoder(ModelRunnerOutput)

    def receive(self) -> tuple[bytes, ModelRunnerOutput]:
        assert self.socket.poll(int(BOUND_S * 1000))
        identity, frame = self.socket.recv_multipart()
        return identity, self._decoder.decode(frame)


@pytest.fixture
def peer() -> Iterator[Peer]:
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))
    made = Peer(folder)
    yield made
    made.socket.close()
    made.context.term()
    shutil.rmtree(folder)


@pytest.fixture
def outputs(peer: Peer) -> Iterator[OutputThread]:
    thread = OutputThread(peer.context, peer.endpoint, "worker-7")
    yield thread
    thread.close(BOUND_S)


def test_results_are_sent_in_the_order_of_the_steps(peer: Peer, outputs: OutputThread) -> None:
    first, second = Pending(1), Pending(2)
    outputs.send(first)
    outputs.send(second)
    second.there.set()
    assert not peer.socket.poll(50), "the second step waits for the first"
    first.there.set()
    received = [peer.receive() for _ in range(2)]
    assert [output.step_id for _, output in received] == [1, 2]
    assert {identity for identity, _ in received} == {b"worker-7/out"}


def test_a_fault_on_the_device_is_the_result_of_its_step(peer: Peer, outputs: OutputThread) -> None:
    for pending in (Pending(1, RuntimeError("device lost")), Pending(2)):
        pending.there.set()
        outputs.send(pending)
    assert peer.receive()[1] == ModelRunnerOutput(1, error="RuntimeError: device lost")
    assert peer.receive()[1].token_ids == b"\x01\x00\x00\x00"


def test_an_answer_to_a_result_is_passed_over(peer: Peer, outputs: OutputThread) -> None:
    for step_id in (1, 2):
        pending = Pending(step_id)
        pending.there.set()
        outputs.send(pending)
        identity, output = peer.receive()
        assert output.step_id == step_id
        peer.socket.send_multipart([identity, encode(BadFrame("not asked for"))])


def test_what_is_queued_is_sent_before_the_end(peer: Peer) -> None:
    thread = OutputThread(peer.context, peer.endpoint, "worker-7")
    for step_id in range(5):
        pending = Pending(step_id)
        pending.there.set()
        thread.send(pending)
    assert thread.close(BOUND_S)
    assert [peer.receive()[1].step_id for _ in range(5)] == list(range(5))


def test_a_device_that_does_not_answer_does_not_hold_up_the_end(peer: Peer) -> None:
    thread = OutputThread(peer.context, peer.endpoint, "worker-7")
    stuck = Pending(1)
    thread.send(stuck)
    assert not thread.close(0.05)
    stuck.there.set()
    assert thread.close(BOUND_S)


def test_what_ends_the_thread_is_known_at_once(peer: Peer, outputs: OutputThread) -> None:
    class Unsendable(Pending):
        def wait(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(self.step_id, object())  # type: ignore[arg-type]

    assert not select.select([outputs.sentinel], [], [], 0)[0]
    outputs.send(Unsendable(1))
    assert select.select([outputs.sentinel], [], [], BOUND_S)[0]
    with pytest.raises(EngineError, match="results can be sent no more: TypeError") as raised:
        outputs.raise_failure()
    assert isinstance(raised.value.__cause__, TypeError)


def test_closing_leaves_no_descriptor(peer: Peer) -> None:
    thread = OutputThread(peer.context, peer.endpoint, "worker-7")
    sentinel = thread.sentinel
    assert thread.close(BOUND_S)
    assert thread.close(BOUND_S)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sentinel)
