"""A frontend without text: it speaks the frontend's protocol to a core, one blocking call at a time, each bounded."""

import os
from collections import defaultdict
from types import TracebackType

import numpy as np
import zmq

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    CoreToFrontend,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineFailed,
    EngineStats,
    FinishedRequest,
    FrontendToCore,
    GetStats,
    Ping,
    RejectedRequest,
    Welcome,
)
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, Hello
from folovllm.common.transport import Decoder, connect, encode, new_socket
from tests.fakes.simulated_logprobs import Place, unpack

BOUND_MS = 30_000


def make_request(number: int, prompt: list[int], max_tokens: int, **others: object) -> EngineCoreRequest:
    """A request with greedy sampling unless `sampling` says otherwise."""
    fields: dict[str, object] = {"sampling": SamplingRow(), "request_id": f"request-{number}", **others}
    prompt_token_ids = np.array(prompt, "<i4").tobytes()
    return EngineCoreRequest(
        number=number,
        prompt_token_ids=prompt_token_ids,
        max_tokens=max_tokens,
        **fields,  # type: ignore[arg-type]
    )


class FakeFrontend:
    """One connection. What comes is sorted into `tokens`, `logprobs`, `finished`, `rejected` and so on."""

    def __init__(self, endpoint: str, *, greet: bool = True) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self._context, zmq.DEALER)
        self._socket.linger = 1000  # what was sent just before the end still counts
        connect(self._socket, endpoint)
        self._decoder: Decoder[CoreToFrontend] = Decoder(CoreToFrontend)
        self._ticket = 0
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.logprobs: defaultdict[int, list[Place]] = defaultdict(list)
        self.prompt_logprobs: defaultdict[int, list[Place]] = defaultdict(list)
        self.finished: dict[int, FinishedRequest] = {}
        self.rejected: dict[int, RejectedRequest] = {}
        self.bad_frames: list[str] = []
        self.failures: list[str] = []
        self.num_pings = 0
        self.welcome: Welcome | None = None
        self._stats: EngineStats | None = None
        if greet:
            self.greet()

    def __enter__(self) -> "FakeFrontend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def greet(self) -> Welcome:
        self.send(Hello("frontend", PROTOCOL_VERSION, os.getpid(), "fake"))
        while self.welcome is None:
            self.receive()
        return self.welcome

    def add(self, *requests: EngineCoreRequest) -> None:
        self.send(AddRequests(list(requests)))

    def abort(self, *numbers: int) -> None:
        self.send(AbortRequests(np.array(numbers, "<i4").tobytes()))

    def stats(self) -> EngineStats:
        self._ticket += 1
        self.send(GetStats(self._ticket))
        while self._stats is None or self._stats.ticket != self._ticket:
            self.receive()
        return self._stats

    def wait_for(self, *numbers: int) -> None:
        """Until each of these answers is finished or refused."""
        while not all(number in self.finished or number in self.rejected for number in numbers):
            self.receive()

    def output(self, number: int) -> list[int]:
        """The whole output of a finished answer, whichever way it was reported."""
        self.wait_for(number)
        at_the_end: list[int] = np.frombuffer(self.finished[number].token_ids, "<i4").tolist()
        return self.tokens[number] + at_the_end

    def send(self, message: FrontendToCore) -> None:
        self.send_raw(encode(message))

    def send_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> None:
        """Takes in the next message."""
        assert self._socket.poll(BOUND_MS), "the core says nothing"
        message = self._decoder.decode(self._socket.recv())
        match message:
            case Welcome():
                self.welcome = message
            case EngineCoreOutputs():
                self._take_outputs(message)
            case EngineStats():
                self._stats = message
            case BadFrame():
                self.bad_frames.append(message.reason)
            case EngineFailed():
                self.failures.append(message.message)
            case Ping():
                self.num_pings += 1

    def close(self) -> None:
        self._context.destroy(1000)

    def _take_outputs(self, outputs: EngineCoreOutputs) -> None:
        numbers, token_ids = (np.frombuffer(field, "<i4").tolist() for field in (outputs.numbers, outputs.token_ids))
        for number, token_id in zip(numbers, token_ids, strict=True):
            assert number not in self.finished, f"a token for {number} after its end"
            self.tokens[number].append(token_id)
        rows = np.frombuffer(outputs.logprob_rows, "<i4").tolist()
        for row, place in zip(rows, unpack(outputs.logprobs), strict=True):
            self.logprobs[numbers[row]].append(place)
        for part in outputs.prompt_logprobs:
            self.prompt_logprobs[part.number] += unpack(part.logprobs)
        for finished in outputs.finished:
            assert finished.number not in self.finished, f"{finished.number} ends twice"
            self.finished[finished.number] = finished
        self.rejected.update({rejected.number: rejected for rejected in outputs.rejected})
