"""The connection to a core: greeting, numbers, and every way in which the other side can end or misbehave."""

import pathlib
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from folovllm.common.config import EngineConfig
from folovllm.common.errors import ConfigError, EngineDeadError, ProtocolError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import EngineCoreOutputs, EngineCoreRequest, EngineStats, Ping
from folovllm.common.messages.lifecycle import BadFrame
from folovllm.common.transport import encode, load_keys
from folovllm.frontend import int32
from folovllm.frontend.core_client import NUMBER_LIMIT, CoreClient, frames_of
from folovllm.frontend.engine_process import EngineProcess
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.unit.frontend.test_engine_process import FAKE_CORE

BOUND_S = 30.0


@pytest.fixture
def client(core: FakeCore) -> Iterator[CoreClient]:
    made = CoreClient(core.endpoint)
    yield made
    made.close()


def request(number: int, *, max_tokens: int = 2, stream: bool = True) -> EngineCoreRequest:
    return EngineCoreRequest(number, "name", int32.pack([5, 6]), SamplingRow(), max_tokens, stream=stream)


def outputs_of(client: CoreClient, numbers: set[int]) -> list[EngineCoreOutputs]:
    """What comes until all these numbers have finished."""
    taken = []
    while numbers:
        received = client.receive(BOUND_S)
        assert received
        for message in received:
            assert isinstance(message, EngineCoreOutputs)
            taken.append(message)
            numbers = numbers - {entry.number for entry in message.finished}
    return taken


def test_greeting(client: CoreClient, model_folder: pathlib.Path) -> None:
    assert client.welcome.model == str(model_folder)
    assert client.welcome.max_model_len == 64


def test_requests_and_outputs(client: CoreClient) -> None:
    client.add([request(7)])
    tokens = [(m.numbers, m.token_ids) for m in outputs_of(client, {7})]
    assert tokens == [(int32.pack([7]), int32.pack([6])), (int32.pack([7]), int32.pack([5]))]


def test_many_requests_go_in_several_frames(client: CoreClient, core: FakeCore) -> None:
    client.add([request(number) for number in range(700)])
    outputs_of(client, set(range(700)))
    assert [r.number for r in core.requests] == list(range(700))


def test_long_prompts_keep_a_frame_below_the_bound() -> None:
    lengths = [20, 20, 24, 1, 64, 65, 1]  # MiB
    data = {length: bytes(length * 2**20) for length in set(lengths)}
    requests = [EngineCoreRequest(i, "r", data[length], SamplingRow(), 1) for i, length in enumerate(lengths)]
    frames = list(frames_of(requests))
    assert [[request.number for request in frame] for frame in frames] == [[0, 1, 2], [3], [4], [5], [6]]
    assert list(frames_of([])) == []


def test_abort(client: CoreClient, core: FakeCore) -> None:
    core.gate.clear()
    client.add([request(1), request(2)])
    client.abort([])
    client.abort([1, 2])
    assert core.wait_until(lambda: core.aborted == [1, 2] and not core.live)


def test_stats_echo_the_ticket(client: CoreClient) -> None:
    client.ask_stats(41)
    (message,) = client.receive(BOUND_S)
    assert isinstance(message, EngineStats)
    assert message.ticket == 41


def test_a_reset_of_the_prefix_cache_is_answered_once_it_is_done(client: CoreClient) -> None:
    client.reset_prefix_cache(7)
    (message,) = client.receive(BOUND_S)
    assert isinstance(message, EngineStats)
    assert (message.ticket, message.num_cached_blocks) == (7, 0)


def test_receive_gives_nothing_if_nothing_comes_in_time(client: CoreClient) -> None:
    assert client.receive(0.01) == []
    assert client.receive_ready() == []


def test_no_more_than_asked_for_is_taken_at_once(client: CoreClient, core: FakeCore) -> None:
    client.add([request(1, max_tokens=5)])
    assert core.wait_until(lambda: bool(core.requests) and not core.live)
    client.ask_stats(1)
    sizes: list[int] = []
    deadline = time.monotonic() + BOUND_S
    while sum(sizes) < 6:  # five steps, and the answer
        sizes.append(len(client.receive_ready(2)))
        assert time.monotonic() < deadline
    assert max(sizes) == 2


def test_numbers_are_consecutive_and_wrap(client: CoreClient) -> None:
    assert [client.allocate(3, ()), client.allocate(1, ()), client.allocate(1, ())] == [0, 3, 4]
    assert client.allocate(2, {6}) == 7
    client._next_number = NUMBER_LIMIT - 2
    assert client.allocate(2, ()) == NUMBER_LIMIT - 2
    assert client.allocate(2, {0, 1, 3}) == 4


def test_nobody_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EngineDeadError, match=r"no engine answers at ipc://.*/nobody within 0\.1 s; start one with"):
        CoreClient(f"ipc://{tmp_path}/nobody", timeout_s=0.1)
    with pytest.raises(ConfigError, match="must start with ipc:// or tcp://"):
        CoreClient("udp://x")


def test_a_core_that_refuses(core: FakeCore) -> None:
    core.refuse_hello = "protocol 1 is too old"
    with pytest.raises(EngineDeadError, match="refuses this frontend: protocol 1 is too old"):
        CoreClient(core.endpoint)


def test_engine_failed_comes_after_what_was_sent_before_it(client: CoreClient, core: FakeCore) -> None:
    client.add([request(1, max_tokens=1)])
    outputs_of(client, {1})
    core.fail("worker-0: MemoryError: full")
    with pytest.raises(EngineDeadError, match="worker-0: MemoryError: full"):
        client.receive(BOUND_S)
    with pytest.raises(EngineDeadError, match="MemoryError"):
        client.receive_ready()


def test_a_lost_connection(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with FakeCore(f"ipc://{tmp_path}/core", model=str(model_folder)) as core:
        client = CoreClient(core.endpoint)
    with pytest.raises(EngineDeadError, match=r"the connection to the engine .* was lost"):
        client.receive(BOUND_S)
    client.close()


def test_the_wrong_key_is_refused(tmp_path: pathlib.Path, model_folder: pathlib.Path) -> None:
    with FakeCore(f"tcp://127.0.0.1:*?key={tmp_path}/right", model=str(model_folder)) as core:
        address, _, _ = core.endpoint.partition("?")
        good = CoreClient(core.endpoint)
        assert good.welcome.device == "fake"
        good.close()
        load_keys(tmp_path / "wrong", create=True)
        with pytest.raises(EngineDeadError, match=r"does not accept this frontend's key|no engine answers"):
            CoreClient(f"{address}?key={tmp_path}/wrong", timeout_s=2.0)


def test_an_own_core_that_is_killed_gives_the_signal() -> None:
    engine = EngineProcess(FAKE_CORE)
    ready = engine.wait_ready(EngineConfig(model="/models/die-at-once"))
    client = CoreClient(ready.endpoint, engine=engine)
    client.add([request(1)])
    with pytest.raises(EngineDeadError, match="was killed by SIGKILL"):
        outputs_of(client, {1})
    client.close()
    engine.stop()


@pytest.mark.parametrize(
    "frame, message",
    [
        (b"\xc1", "is no valid message"),
        (encode(BadFrame("number 5 is taken")), "refused a frame of this frontend: number 5 is taken"),
    ],
)
def test_frames_that_nobody_is_to_blame_for_end_the_connection(
    tmp_path: pathlib.Path, frame: bytes, message: str
) -> None:
    with FakeCore(f"ipc://{tmp_path}/core") as core:
        client = CoreClient(core.endpoint)
        core.send_raw(frame)
        with pytest.raises(EngineDeadError, match=f"given up, as it makes no sense: .*{message}") as caught:
            client.receive(BOUND_S)
        assert isinstance(caught.value.__cause__, ProtocolError)
        client.close()
        for call in (client.receive_ready, client.receive, lambda: client.ask_stats(1)):
            with pytest.raises(EngineDeadError, match=message):
                call()


def test_what_came_before_a_bad_frame_is_given_out_first(tmp_path: pathlib.Path) -> None:
    with FakeCore(f"ipc://{tmp_path}/core") as core:
        client = CoreClient(core.endpoint)
        core.gate.clear()
        core.send_raw(encode(EngineCoreOutputs()))
        core.send_raw(b"\xc1")
        assert client.receive(BOUND_S)[:1] == [EngineCoreOutputs()]
        with pytest.raises(EngineDeadError, match="given up"):
            client.receive(BOUND_S)
        client.close()


def test_a_malformed_entry_ends_its_request_here_and_in_the_core(client: CoreClient, core: FakeCore) -> None:
    core.gate.clear()
    client.add([request(1), request(2)])
    assert core.wait_until(lambda: len(core.live) == 2)
    core.send_raw(msgspec.msgpack.encode(["outputs", b"", b"", [[1, "no such reason"]]]))
    (message,) = client.receive(BOUND_S)
    assert isinstance(message, EngineCoreOutputs)
    assert [(end.number, end.finish_reason) for end in message.finished] == [(1, "error")]
    assert core.wait_until(lambda: core.aborted == [1])
    core.gate.set()
    outputs_of(client, {2})


def test_a_second_welcome_is_a_fault_and_a_ping_is_none(tmp_path: pathlib.Path) -> None:
    with FakeCore(f"ipc://{tmp_path}/core") as core:
        client = CoreClient(core.endpoint)
        core.send_raw(encode(Ping()))
        assert client.receive(BOUND_S) == []
        core.send_raw(encode(client.welcome))
        with pytest.raises(EngineDeadError, match="unexpected Welcome"):
            client.receive(BOUND_S)
        client.close()


def test_a_closed_client_sends_nothing(client: CoreClient) -> None:
    client.close()
    client.close()
    with pytest.raises(EngineDeadError, match="closed"):
        client.ask_stats(0)
    assert client._socket.closed
    assert isinstance(client._context, zmq.Context)
