"""Who is connected, what each is sent, and whose requests become orphans; the socket is a list of frames."""

import dataclasses
import itertools
import pathlib

import msgspec
import numpy as np
import pytest
import zmq

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    CoreToFrontend,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineFailed,
    GetStats,
    Ping,
    RequestPromptLogprobs,
    Welcome,
)
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, Hello
from folovllm.common.transport import bind, connect, encode, new_socket
from folovllm.core_proc.frontends import Frontends
from folovllm.core_proc.logprobs_route import RoutedLogprobs
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.scheduler import StepOutcome
from tests.fakes.fake_router import FakeRouter
from tests.fakes.simulated_logprobs import Place, pack, unpack
from tests.fakes.simulated_worker import integers

WELCOME = Welcome("m", 64, 100, 4, 10, 2, "fake", "float32", "0")
HELLO = Hello("frontend", PROTOCOL_VERSION, 12, "peer")


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def frontends(router: FakeRouter) -> Frontends:
    """Two frontends, `a` and `b`, have been welcomed."""
    frontends = Frontends(router, WELCOME)  # type: ignore[arg-type]
    router.incoming = [[b"a", encode(HELLO)], [b"b", encode(HELLO)]]
    assert not list(frontends.receive())
    assert router.take() == [(b"a", WELCOME), (b"b", WELCOME)]
    return frontends


def add_request(router: FakeRouter, frontends: Frontends, identity: bytes, number: int) -> Request:
    """A live request of the frontend `identity`."""
    router.incoming.append([identity, encode(GetStats(0))])
    ((frontend, _),) = frontends.receive()
    request = Request(frontend.client, number, "r", np.ones(1, np.int32), SamplingRow(), max_tokens=1)
    frontend.requests[number] = request
    return request


def outcome(*tokens: tuple[int, int, int], finished: list[Request] | None = None) -> StepOutcome:
    clients, numbers, token_ids = np.array(tokens, np.int32).reshape(-1, 3).T
    return StepOutcome(clients, numbers, token_ids, finished or [])


def tokens_of(message: CoreToFrontend) -> list[tuple[int, int]]:
    assert isinstance(message, EngineCoreOutputs)
    numbers, token_ids = (np.frombuffer(field, "<i4").tolist() for field in (message.numbers, message.token_ids))
    return list(zip(numbers, token_ids, strict=True))


def end(request: Request) -> Request:
    request.become(RequestStatus.RUNNING, "test")
    request.become(RequestStatus.FINISHED_LENGTH_CAPPED, "test")
    request.output_token_ids = np.array([7, 8], np.int32)
    return request


def test_messages_come_with_their_frontend_in_order(router: FakeRouter, frontends: Frontends) -> None:
    messages = [AddRequests([]), AbortRequests(b""), GetStats(3)]
    router.incoming = [[identity, encode(message)] for identity in (b"b", b"a") for message in messages]
    received = list(frontends.receive())
    assert [(frontend.identity, message) for frontend, message in received] == list(
        itertools.product((b"b", b"a"), messages)
    )
    assert {frontend.client for frontend, _ in received} == {0, 1}


@pytest.mark.parametrize(
    "frames",
    [
        [b"new", encode(GetStats(1))],
        [b"new", encode(Hello("worker", PROTOCOL_VERSION, 1, "x"))],
        [b"new", encode(Hello("frontend", PROTOCOL_VERSION + 1, 1, "x"))],
        [b"a", encode(AbortRequests(b"abc"))],
        [b"a", b"\xff"],
        [b"a"],
        [b"a", encode(GetStats(1)), b""],
    ],
)
def test_bad_frames_are_answered_and_have_no_effect(
    router: FakeRouter, frontends: Frontends, frames: list[bytes]
) -> None:
    router.incoming = [frames, [b"b", encode(GetStats(2))]]
    assert [message for _, message in frontends.receive()] == [GetStats(2)]
    ((identity, answer),) = router.take()
    assert identity == frames[0]
    assert isinstance(answer, BadFrame)
    assert len(frontends) == 2


def test_a_malformed_request_is_refused_alone(router: FakeRouter, frontends: Frontends) -> None:
    right = EngineCoreRequest(3, "r", b"\1\0\0\0", SamplingRow(), 4)
    values = msgspec.msgpack.decode(encode(AddRequests([right, right])))
    values[1][0][:2] = [2, 7]
    frame = msgspec.msgpack.encode(values)
    router.incoming.append([b"a", frame])
    ((frontend, message),) = frontends.receive()
    assert frontend.identity == b"a"
    assert message == AddRequests([right])
    ((identity, answer),) = router.take()
    assert identity == b"a"
    assert isinstance(answer, EngineCoreOutputs)
    assert [(entry.number, entry.kind, entry.field) for entry in answer.rejected] == [(2, "invalid", "request_id")]
    router.incoming.append([b"stranger", frame])
    assert not list(frontends.receive())
    ((identity, answer),) = router.take()
    assert identity == b"stranger"
    assert isinstance(answer, BadFrame)


def test_a_bad_frame_message_is_not_answered(router: FakeRouter, frontends: Frontends) -> None:
    router.incoming = [[b"a", encode(BadFrame("what?"))], [b"new", encode(BadFrame("what?"))]]
    assert not list(frontends.receive())
    assert not router.take()


def test_tokens_of_one_frontend_go_out_in_one_message(router: FakeRouter, frontends: Frontends) -> None:
    frontends.send_outcome(outcome((1, 5, 50), (1, 6, 60)))
    ((identity, message),) = router.take()
    assert identity == b"b"
    assert tokens_of(message) == [(5, 50), (6, 60)]


def test_tokens_and_ends_are_split_by_frontend(router: FakeRouter, frontends: Frontends) -> None:
    ended = [end(add_request(router, frontends, identity, 9)) for identity in (b"a", b"b")]
    frontends.send_outcome(outcome((0, 5, 50), (1, 5, 51), (0, 6, 60), finished=ended))
    sent = dict(router.take())
    assert tokens_of(sent[b"a"]) == [(5, 50), (6, 60)]
    assert tokens_of(sent[b"b"]) == [(5, 51)]
    for message in sent.values():
        assert isinstance(message, EngineCoreOutputs)
        ((number, reason, token_ids),) = [(f.number, f.finish_reason, f.token_ids) for f in message.finished]
        assert (number, reason) == (9, "length")
        assert np.frombuffer(token_ids, "<i4").tolist() == [7, 8]


def test_an_end_alone_is_told_and_the_request_forgotten(router: FakeRouter, frontends: Frontends) -> None:
    request = add_request(router, frontends, b"b", 9)
    frontends.send_outcome(outcome(finished=[end(request)]))
    ((identity, message),) = router.take()
    assert identity == b"b"
    assert isinstance(message, EngineCoreOutputs)
    router.gone = {b"b"}
    frontends.ping(0.0)
    assert not frontends.take_orphans()


def test_nothing_to_tell_sends_nothing(router: FakeRouter, frontends: Frontends) -> None:
    frontends.send_outcome(outcome())
    assert not router.take()


def test_ping_goes_out_once_a_second_and_finds_who_is_gone(router: FakeRouter, frontends: Frontends) -> None:
    request = add_request(router, frontends, b"a", 1)
    frontends.ping(10.0)
    frontends.ping(10.9)
    assert router.take() == [(b"a", Ping()), (b"b", Ping())]
    router.gone = {b"a"}
    frontends.ping(11.0)
    assert router.take() == [(b"b", Ping())]
    assert len(frontends) == 1
    assert frontends.take_orphans() == [request]
    assert not frontends.take_orphans()


def test_what_comes_for_a_frontend_that_is_gone_is_dropped(router: FakeRouter, frontends: Frontends) -> None:
    request = add_request(router, frontends, b"a", 1)
    router.gone = {b"a"}
    frontends.send_outcome(outcome((0, 1, 5)))
    assert frontends.take_orphans() == [request]
    frontends.send_outcome(outcome((0, 1, 6), (1, 1, 7), finished=[end(request)]))
    ((identity, message),) = router.take()
    assert (identity, tokens_of(message)) == (b"b", [(1, 7)])


def test_a_second_hello_orphans_the_first_ones_requests(router: FakeRouter, frontends: Frontends) -> None:
    request = add_request(router, frontends, b"a", 1)
    router.incoming = [[b"a", encode(HELLO)], [b"a", encode(GetStats(1))]]
    ((frontend, _),) = frontends.receive()
    assert frontend.client == 2
    assert not frontend.requests
    assert frontends.take_orphans() == [request]
    assert len(frontends) == 2


def test_a_frontend_that_does_not_read_is_given_up_and_told_so_when_it_does(
    router: FakeRouter, frontends: Frontends
) -> None:
    request = add_request(router, frontends, b"a", 1)
    router.full = {b"a"}
    frontends.send_outcome(outcome((0, 1, 5), (1, 1, 7)))
    assert frontends.take_orphans() == [request]
    assert [(identity, tokens_of(message)) for identity, message in router.take()] == [(b"b", [(1, 7)])]
    frontends.ping(1.0)
    assert router.take() == [(b"b", Ping())]
    router.full = set()
    frontends.ping(2.0)
    (_, (identity, message)) = router.take()
    assert identity == b"a"
    assert isinstance(message, EngineFailed)
    assert "8192 messages of the engine unread" in message.message
    frontends.ping(3.0)
    assert router.take() == [(b"b", Ping())]


def test_log_probabilities_go_to_those_they_are_for(router: FakeRouter, frontends: Frontends) -> None:
    places = [Place([(50, -1.0)], 1), Place([(51, -2.0), (9, -0.5)], 2)]
    part = RequestPromptLogprobs(8, 1, pack(places))
    routed = RoutedLogprobs(np.array([1, 2], np.int32), pack(places), [(1, part), (7, part)])
    tokens = outcome((0, 4, 40), (0, 5, 50), (1, 5, 51))
    frontends.send_outcome(dataclasses.replace(tokens, logprobs=routed))
    sent = dict(router.take())
    first, second = sent[b"a"], sent[b"b"]
    assert isinstance(first, EngineCoreOutputs)
    assert isinstance(second, EngineCoreOutputs)
    assert (tokens_of(first), integers(first.logprob_rows)) == ([(4, 40), (5, 50)], [1])
    assert (tokens_of(second), integers(second.logprob_rows)) == ([(5, 51)], [0])
    assert (unpack(first.logprobs), first.prompt_logprobs) == (places[:1], [])
    assert (unpack(second.logprobs), second.prompt_logprobs) == (places[1:], [part])


def test_parts_of_prompts_come_without_tokens_and_long_ones_one_by_one(
    router: FakeRouter, frontends: Frontends, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [RequestPromptLogprobs(number, 1, pack([Place([(1, -1.0)], 1)])) for number in (3, 4)]
    routed = RoutedLogprobs(np.empty(0, np.int32), None, [(0, part) for part in parts])
    ended = end(add_request(router, frontends, b"a", 9))
    frontends.send_outcome(dataclasses.replace(outcome(), logprobs=routed))
    ((_, message),) = router.take()
    assert isinstance(message, EngineCoreOutputs)
    assert message.prompt_logprobs == parts
    monkeypatch.setattr("folovllm.core_proc.frontends._LONG_PROMPT_PARTS_BYTES", 4)
    frontends.send_outcome(dataclasses.replace(outcome((0, 3, 30), finished=[ended]), logprobs=routed))
    messages = [message for _, message in router.take() if isinstance(message, EngineCoreOutputs)]
    assert [message.prompt_logprobs for message in messages] == [[parts[0]], [parts[1]], []]
    assert [len(message.finished) for message in messages] == [0, 0, 1]
    assert tokens_of(messages[-1]) == [(3, 30)]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_frontend_given_up_that_leaves_or_greets_anew_is_told_nothing(
    router: FakeRouter, frontends: Frontends, is_gone: bool
) -> None:
    router.full = {b"a"}
    frontends.ping(1.0)
    router.full = set()
    if is_gone:
        router.gone = {b"a"}
    else:
        router.incoming = [[b"a", encode(HELLO)]]
        assert not list(frontends.receive())
    router.take()
    for now_s in (2.0, 3.0):
        frontends.ping(now_s)
    assert {type(message) for _, message in router.take()} == {Ping}
    assert len(frontends) == (1 if is_gone else 2)


def test_a_real_socket_reports_a_peer_that_does_not_read(tmp_path: pathlib.Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket, peer = new_socket(context, zmq.ROUTER), new_socket(context, zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 5)
    endpoint, _ = bind(socket, f"ipc://{tmp_path}/core")
    peer.setsockopt(zmq.RCVHWM, 1)
    connect(peer, endpoint)
    peer.send(encode(HELLO))
    assert socket.poll(10_000)
    frontends = Frontends(socket, WELCOME)
    assert not list(frontends.receive())
    assert len(frontends) == 1
    zeros = np.zeros(2**16, np.int32)
    for _ in range(1000):
        frontends.send_outcome(StepOutcome(zeros, zeros, zeros, []))
        if not len(frontends):
            break
    assert not len(frontends)
    context.destroy(0)


def test_all_are_told_that_the_engine_failed(router: FakeRouter, frontends: Frontends) -> None:
    frontends.fail("worker died")
    assert router.take() == [(b"a", EngineFailed("worker died")), (b"b", EngineFailed("worker died"))]
