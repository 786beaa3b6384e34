"""The connected frontends: who they are, which requests are whose, and what each of them is sent.

A frontend is known by a small number of the core's (`client`) for as long as its connection lives. Its end shows when a
frame cannot be delivered, so that each is sent a Ping once a second; its requests are then orphans, to be aborted.

What a frontend that is stopped does not read is kept for it, up to a bound: then it is given up like one that is gone,
and the first thing it learns after what was kept is that it was.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import zmq

from folovllm.common.errors import ProtocolError
from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    CoreToFrontend,
    EngineCoreOutputs,
    EngineFailed,
    FinishedRequest,
    FrontendToCore,
    GetSnapshot,
    GetStats,
    Ping,
    RejectedRequest,
    ResetPrefixCache,
    Welcome,
)
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, BadFrame, Hello
from folovllm.common.transport import Decoder, encode
from folovllm.core_proc.logprobs_route import NO_LOGPROBS, ClientLogprobs, RoutedLogprobs, logprobs_for
from folovllm.core_proc.refusals import Refusals, receive_waiting
from folovllm.core_proc.request import Request
from folovllm.core_proc.request_frames import without_malformed
from folovllm.core_proc.scheduler import StepOutcome

MAX_KEPT_FRAMES: Final = 8192  # what one frontend leaves unread; minutes of streams, at 1 kB a frame some megabytes
PING_INTERVAL_S: Final = 1.0  # how long a frontend that is gone may keep its blocks
_PING: Final = encode(Ping())
_GIVEN_UP: Final = encode(
    EngineFailed(f"this frontend left {MAX_KEPT_FRAMES} messages of the engine unread; its requests were aborted")
)
_LONG_PROMPT_PARTS_BYTES = 8 * 2**20
_TOKEN_ID_BYTES = 4
_MAX_NAME_CHARACTERS = 32  # it is a peer's own, and goes into the log

Asked = AddRequests | AbortRequests | GetStats | GetSnapshot | ResetPrefixCache

logger = get_logger(__name__)


class Frontend:
    """One connected frontend and its live requests by their numbers."""

    def __init__(self, client: int, identity: bytes, name: str) -> None:
        self.client = client
        self.identity = identity
        self.name = name
        self.requests: dict[int, Request] = {}


class Frontends:
    """All connected frontends behind one ROUTER socket, whose SNDHWM bounds what is kept for each."""

    def __init__(self, socket: "zmq.Socket[bytes]", welcome: Welcome) -> None:
        self.socket = socket
        self._welcome = welcome
        self._refusals = Refusals(socket, "frontend link")
        self._decoder: Decoder[FrontendToCore] = Decoder(FrontendToCore)
        self._by_identity: dict[bytes, Frontend] = {}
        self._by_client: dict[int, Frontend] = {}
        self._next_client = 0
        self._next_ping_s = 0.0
        self._orphans: list[Request] = []
        self._given_up: set[bytes] = set()  # identities to be told so as soon as they read again

    def __len__(self) -> int:
        return len(self._by_client)

    def receive(self) -> Iterator[tuple[Frontend, Asked]]:
        """What the frontends ask for, in the order of arrival; greetings and bad frames are dealt with here."""
        for identity, frame in receive_waiting(self.socket):
            message: FrontendToCore | None
            try:
                message = self._decode(identity, frame)
            except ProtocolError as error:
                message = self._without_malformed(identity, frame)
                if message is None:
                    self._refusals.refuse(identity, str(error))
                    continue
            if isinstance(message, Hello):
                self._greet(identity, message)
            elif isinstance(message, BadFrame):
                self._refusals.note(identity, f"says that a frame of ours is bad: {message.reason}")
            else:
                yield self._by_identity[identity], message

    def take_orphans(self) -> list[Request]:
        """The live requests of frontends that are gone; each is told once."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def send(self, frontend: Frontend, message: CoreToFrontend) -> None:
        """Sends one message; a frontend that cannot be reached is forgotten."""
        self._deliver(frontend, encode(message))

    def send_outcome(self, outcome: StepOutcome) -> None:
        """Tells each frontend what a step brought for it, in one message (long parts of prompts in more before it)."""
        finished = self._finished_by_client(outcome.finished)
        clients = outcome.clients
        if outcome.logprobs is not None:
            self._send_with_logprobs(outcome, outcome.logprobs, finished)
        elif len(clients) and clients[0] == clients.max() == clients.min():  # mostly one: nothing to pick apart
            self._send_outputs(int(clients[0]), outcome.numbers.tobytes(), outcome.token_ids.tobytes(), finished)
        else:
            for client in np.unique(clients).tolist():
                mine = clients == client
                numbers, token_ids = outcome.numbers[mine].tobytes(), outcome.token_ids[mine].tobytes()
                self._send_outputs(client, numbers, token_ids, finished)
        for client in list(finished):
            self._send_outputs(client, b"", b"", finished)

    def reject(self, client: int, numbers: Iterable[int], refusal: RejectedRequest) -> None:
        """Refuses a request that counted as taken; `numbers` are its answers'."""
        frontend = self._by_client.get(client)
        if frontend is not None:
            for number in numbers:
                frontend.requests.pop(number, None)
            self.send(frontend, EngineCoreOutputs(rejected=[refusal]))

    def ping(self, now_s: float) -> None:
        """Once a second: finds frontends that are gone."""
        if now_s < self._next_ping_s:
            return
        self._next_ping_s = now_s + PING_INTERVAL_S
        for frontend in list(self._by_client.values()):
            self._deliver(frontend, _PING)
        self._given_up = {identity for identity in self._given_up if not self._tell_given_up(identity)}

    def fail(self, message: str) -> None:
        """Tells all frontends that the engine ends."""
        for frontend in list(self._by_client.values()):
            self.send(frontend, EngineFailed(message))

    def _decode(self, identity: bytes, frame: bytes | None) -> FrontendToCore:
        if frame is None:
            raise ProtocolError("a message is one frame")
        message = self._decoder.decode(frame)
        if identity not in self._by_identity and not isinstance(message, Hello | BadFrame):
            raise ProtocolError("the first message must be Hello")
        if isinstance(message, AbortRequests) and len(message.numbers) % _TOKEN_ID_BYTES:
            raise ProtocolError(f"{len(message.numbers)} bytes are no whole number of int32 request numbers")
        return message

    def _without_malformed(self, identity: bytes, frame: bytes | None) -> AddRequests | None:
        """What is right of a frame of new requests; those that are malformed are refused, each by its number."""
        frontend = self._by_identity.get(identity)
        saved = None if frontend is None or frame is None else without_malformed(frame)
        if frontend is None or saved is None:
            return None
        requests, refused = saved
        self._refusals.note(identity, f"{len(refused)} requests refused; the first: {refused[0].message}")
        self.send(frontend, EngineCoreOutputs(rejected=refused))
        return requests if identity in self._by_identity else None  # it may turn out to be gone

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.role != "frontend":
            self._refusals.refuse(identity, f"frontends are served here, not a {hello.role}")
            return
        if hello.protocol != PROTOCOL_VERSION:
            reason = f"this engine speaks protocol {PROTOCOL_VERSION}, the frontend {hello.protocol}; use one version"
            self._refusals.refuse(identity, reason)
            return
        if identity in self._by_identity:
            self._forget(self._by_identity[identity], "greets anew")
        self._given_up.discard(identity)
        frontend = Frontend(self._next_client, identity, f"{hello.name[:_MAX_NAME_CHARACTERS]!r} (pid {hello.pid})")
        self._next_client += 1
        self._by_identity[identity] = frontend
        self._by_client[frontend.client] = frontend
        logger.info("frontend %s connected; %d in all", frontend.name, len(self))
        self.send(frontend, self._welcome)

    def _finished_by_client(self, finished: list[Request]) -> dict[int, list[FinishedRequest]]:
        by_client: dict[int, list[FinishedRequest]] = {}
        for request in finished:
            frontend = self._by_client.get(request.client)
            if frontend is not None:
                frontend.requests.pop(request.number, None)
                by_client.setdefault(request.client, []).append(finished_message(request))
        return by_client

    def _send_with_logprobs(
        self, outcome: StepOutcome, routed: RoutedLogprobs, finished: dict[int, list[FinishedRequest]]
    ) -> None:
        clients = {*outcome.clients.tolist(), *(client for client, _ in routed.prompts)}
        for client in sorted(clients):
            mine = outcome.clients == client
            logprobs = logprobs_for(routed, client, mine)
            numbers, token_ids = outcome.numbers[mine].tobytes(), outcome.token_ids[mine].tobytes()
            self._send_outputs(client, numbers, token_ids, finished, logprobs)

    def _send_outputs(
        self,
        client: int,
        numbers: bytes,
        token_ids: bytes,
        finished: dict[int, list[FinishedRequest]],
        logprobs: ClientLogprobs = NO_LOGPROBS,
    ) -> None:
        ended = finished.pop(client, [])
        for message in _outputs(numbers, token_ids, ended, logprobs):
            frontend = self._by_client.get(client)
            if frontend is not None:
                self.send(frontend, message)

    def _deliver(self, frontend: Frontend, frame: bytes) -> None:
        try:
            self.socket.send_multipart([frontend.identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            self._given_up.add(frontend.identity)
            self._forget(frontend, f"left {MAX_KEPT_FRAMES} messages unread and is given up")
        except zmq.ZMQError as error:
            expected = error.errno == zmq.EHOSTUNREACH  # how every connection that was closed shows; no failure
            self._forget(frontend, "is gone" if expected else f"is gone ({error.strerror})")

    def _tell_given_up(self, identity: bytes) -> bool:
        """Whether there is nothing left to do for it: it was told, or it is gone."""
        try:
            self.socket.send_multipart([identity, _GIVEN_UP], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            logger.debug("a frontend that was given up is gone (%s)", error.strerror)
        return True

    def _forget(self, frontend: Frontend, why: str) -> None:
        if self._by_client.pop(frontend.client, None) is None:
            return
        del self._by_identity[frontend.identity]
        logger.info("frontend %s %s; %d requests aborted", frontend.name, why, len(frontend.requests))
        self._orphans += frontend.requests.values()
        frontend.requests.clear()


def _outputs(
    numbers: bytes, token_ids: bytes, finished: list[FinishedRequest], logprobs: ClientLogprobs
) -> list[EngineCoreOutputs]:
    """One message; where parts of prompts are long, each in one of its own before it, since frames are bounded."""
    prompts, before = logprobs.prompts, []
    if sum(len(part.logprobs.token_ids) for part in prompts) > _LONG_PROMPT_PARTS_BYTES:
        before = [EngineCoreOutputs(prompt_logprobs=[part]) for part in prompts]
        prompts = []
    return [*before, EngineCoreOutputs(numbers, token_ids, finished, [], logprobs.rows, logprobs.logprobs, prompts)]


def finished_message(request: Request) -> FinishedRequest:
    """What its frontend is told of a finished request."""
    return FinishedRequest(
        number=request.number,
        finish_reason=request.finish_reason,
        stop_token_id=request.stop_token_id,
        token_ids=b"" if request.stream else request.output_token_ids.tobytes(),
        num_cached_tokens=request.num_cached_tokens,
        num_preemptions=request.num_preemptions,
        queue_s=request.queue_s,
        first_token_s=request.first_token_s,
        total_s=request.total_s,
        error=request.error,
    )
