"""A core without scheduler and worker, for tests of frontends: it answers each request with ids from a script.

In a thread (`FakeCore`), or as a program that `EngineProcess` starts (`python -m tests.fakes.fake_core_for_frontend`);
there the model's folder name chooses what it does: `fail-…` reports Failed, `exit-…` exits with code 7, `interrupt-…`
sends its parent SIGINT and never gets ready, `die-…` kills itself once it has a request, everything else serves.
"""

import argparse
import os
import pathlib
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import zmq

from folovllm.common.child_process import ParentWatch
from folovllm.common.messages.core_worker import Logprobs, SamplingRow
from folovllm.common.messages.frontend_core import (
    AbortRequests,
    AddRequests,
    CoreToFrontend,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineFailed,
    EngineSnapshot,
    EngineStats,
    FinishedRequest,
    FinishReason,
    FrontendToCore,
    GetSnapshot,
    GetStats,
    RejectedRequest,
    RequestPromptLogprobs,
    ResetPrefixCache,
    Welcome,
)
from folovllm.common.messages.lifecycle import (
    PROTOCOL_VERSION,
    BadFrame,
    ConfigureCore,
    CoreReady,
    Failed,
    Hello,
    MemoryUse,
    ParentToCore,
    PhaseTime,
)
from folovllm.common.transport import Decoder, bind, connect, encode, new_socket
from folovllm.frontend import int32

Script = Callable[[EngineCoreRequest, int], Sequence[int]]

IDS_PER_PROMPT = (72, 105, 33)


def echo(request: EngineCoreRequest, index: int) -> Sequence[int]:
    """The prompt backwards, again and again; answer `index` starts that much later."""
    prompt = int32.unpack(request.prompt_token_ids)[::-1]
    repeated = prompt * (request.max_tokens // len(prompt) + index + 2)
    return repeated[index:]


def logprobs_of(token_ids: Sequence[int], num_top: int) -> Logprobs:
    """Made up, told apart by token: token t has -t/1000 and rank 2, its alternatives are t+1, t+2, … at -1, -2, …"""
    entries = [[(t, -t / 1000), *((t + i, -float(i)) for i in range(1, num_top + 1))] for t in token_ids]
    flat = [entry for place in entries for entry in place]
    return Logprobs(
        counts=int32.pack([len(place) for place in entries]),
        token_ids=int32.pack([token_id for token_id, _ in flat]),
        values=struct.pack(f"<{len(flat)}f", *(value for _, value in flat)),
        ranks=int32.pack([2] * len(entries)),
    )


class FakeCore:
    """Serves on an ipc endpoint from a thread; one token per live answer and round.

    A request with log probabilities gets those of `logprobs_of`. One with a time limit has run out of time after its
    first token.

    Attributes:
        endpoint: where it listens.
        requests: all that came.
        aborted: numbers that were aborted.
        live: (identity, number) of answers in work.
        reject: what to refuse: called with a request, returns a rejection or None.
        num_cached_blocks: what statistics say; a reset puts it to 0.
        gate: while cleared, no token is made; `steps` counts rounds that made tokens.
    """

    def __init__(
        self, endpoint: str, script: Script = echo, *, model: str = "/nowhere", max_model_len: int = 64
    ) -> None:
        self.endpoint = endpoint
        self.requests: list[EngineCoreRequest] = []
        self.aborted: list[int] = []
        self.live: dict[tuple[bytes, int], tuple[EngineCoreRequest, list[int], list[int]]] = {}
        self.reject: Callable[[EngineCoreRequest], RejectedRequest | None] = lambda _: None
        self.fail_with: Callable[[EngineCoreRequest], str] = lambda _: ""
        self.gate = threading.Event()
        self.gate.set()
        self.changed = threading.Condition()
        self.die_on_request = False
        self.refuse_hello = ""
        self.num_cached_blocks = 7
        self.is_recovering = False
        self._script = script
        self._welcome = Welcome(model, max_model_len, 152000, 16, 100, 8, "fake", "float32", "0")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = new_socket(self._context, zmq.ROUTER)
        self.endpoint, self._authenticator = bind(self._socket, endpoint)
        self._decoder: Decoder[FrontendToCore] = Decoder(FrontendToCore)
        self._frontends: set[bytes] = set()
        self._stop = threading.Event()
        self._raw: list[bytes] = []
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="fake-core")

    def __enter__(self) -> "FakeCore":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it and hangs up on all frontends; may be called again."""
        self._stop.set()
        self._thread.join()

    def fail(self, message: str) -> None:
        """Tells all frontends that the engine ends."""
        self._failure = message

    def send_raw(self, frame: bytes) -> None:
        """Sends any bytes to all frontends."""
        self._raw.append(frame)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Waits, bounded, until a condition on this core's state holds."""
        with self.changed:
            return self.changed.wait_for(condition, timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            busy = self.gate.is_set() and bool(self.live)
            while self._socket.poll(0 if busy else 5):
                self._receive()
                busy = True
            while self._raw:
                frame = self._raw.pop(0)
                for identity in self._frontends:
                    self._socket.send_multipart([identity, frame])
            if self._failure:
                self._broadcast(EngineFailed(self._failure))
                self._failure = ""
            if self.gate.is_set() and self.live:
                self._step()
            with self.changed:
                self.changed.notify_all()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()

    def _send(self, identity: bytes, message: CoreToFrontend) -> None:
        try:
            self._socket.send_multipart([identity, encode(message)])
        except zmq.ZMQError:
            self._frontends.discard(identity)
            self.live = {key: value for key, value in self.live.items() if key[0] != identity}

    def _broadcast(self, message: CoreToFrontend) -> None:
        for identity in list(self._frontends):
            self._send(identity, message)

    def _receive(self) -> None:
        identity, frame = self._socket.recv_multipart()
        message = self._decoder.decode(frame)
        if isinstance(message, Hello):
            self._frontends.add(identity)
            self._send(identity, BadFrame(self.refuse_hello) if self.refuse_hello else self._welcome)
        elif isinstance(message, AddRequests):
            for request in message.requests:
                self._add(identity, request)
        elif isinstance(message, AbortRequests):
            numbers = int32.unpack(message.numbers)
            self.aborted += numbers
            for number in numbers:
                self.live.pop((identity, number), None)
        elif isinstance(message, GetStats | ResetPrefixCache):
            if isinstance(message, ResetPrefixCache):
                self.num_cached_blocks = 0
            self._send(identity, self._stats(message.ticket))
        elif isinstance(message, GetSnapshot):
            stats = self._stats(message.ticket)
            self._send(identity, EngineSnapshot(message.ticket, stats, 64, [], [], bytes([0, 1, 2, 3]), 25))

    def _stats(self, ticket: int) -> EngineStats:
        totals = (0, 0, 0, 0, 0, 1, 0, 0)
        return EngineStats(
            ticket,
            len(self.live),
            0,
            100,
            100,
            *totals,
            num_cached_blocks=self.num_cached_blocks,
            is_recovering=self.is_recovering,
        )

    def _add(self, identity: bytes, request: EngineCoreRequest) -> None:
        self.requests.append(request)
        if self.die_on_request:
            os.kill(os.getpid(), signal.SIGKILL)
        rejected = self.reject(request)
        if rejected is not None:
            self._send(identity, EngineCoreOutputs(rejected=[rejected]))
            return
        if request.sampling.prompt_logprobs is not None:
            self._send(identity, EngineCoreOutputs(prompt_logprobs=_prompt_logprobs(request)))
        for index in range(request.n):
            ids = list(self._script(request, index))[: request.max_tokens]
            self.live[identity, request.number + index] = (request, ids, [])

    def _step(self) -> None:
        tokens: dict[bytes, list[tuple[EngineCoreRequest, int, int]]] = {}
        finished: dict[bytes, list[FinishedRequest]] = {}
        for (identity, number), (request, ids, made) in list(self.live.items()):
            error = self.fail_with(request)
            if error:
                finished.setdefault(identity, []).append(FinishedRequest(number, "error", error=error))
                del self.live[identity, number]
                continue
            token = ids.pop(0)
            made.append(token)
            if request.stream:
                tokens.setdefault(identity, []).append((request, number, token))
            stops = int32.unpack(request.sampling.stop_token_ids)
            stopped = token in stops and len(made) > request.sampling.min_tokens
            if stopped or not ids or request.timeout_s is not None:
                finished.setdefault(identity, []).append(_end(request, number, made, token if stopped else None))
                del self.live[identity, number]
        for identity in tokens.keys() | finished.keys():
            self._send(identity, _outputs(tokens.get(identity, []), finished.get(identity, [])))


def _outputs(
    tokens: Sequence[tuple[EngineCoreRequest, int, int]], finished: list[FinishedRequest]
) -> EngineCoreOutputs:
    """Of (request, number, token), those that want none between those that want log probabilities."""
    rows = [row for row, (request, _, _) in enumerate(tokens) if request.sampling.logprobs is not None]
    each = [logprobs_of([tokens[row][2]], tokens[row][0].sampling.logprobs or 0) for row in rows]
    together = [b"".join(part[i] for part in map(msgspec.structs.astuple, each)) for i in range(4)]
    return EngineCoreOutputs(
        int32.pack([number for _, number, _ in tokens]),
        int32.pack([token for _, _, token in tokens]),
        finished,
        logprob_rows=int32.pack(rows),
        logprobs=Logprobs(*together) if rows else None,
    )


def _prompt_logprobs(request: EngineCoreRequest) -> list[RequestPromptLogprobs]:
    """In two parts, as of a prompt that was computed in two chunks."""
    ids = int32.unpack(request.prompt_token_ids)
    top = request.sampling.prompt_logprobs or 0
    half = max(1, len(ids) // 2)
    parts = [(1, ids[1:half]), (half, ids[half:])]
    return [RequestPromptLogprobs(request.number, start, logprobs_of(part, top)) for start, part in parts if part]


def _end(request: EngineCoreRequest, number: int, made: list[int], stop_token: int | None) -> FinishedRequest:
    reason: FinishReason = "timeout" if request.timeout_s is not None else "length"
    return FinishedRequest(
        number,
        reason if stop_token is None else "stop",
        stop_token_id=stop_token,
        token_ids=b"" if request.stream else int32.pack(made),
        num_cached_tokens=3,
        num_preemptions=1,
        queue_s=0.25,
        first_token_s=0.5,
        total_s=0.75,
    )


def row(**values: Any) -> SamplingRow:
    return SamplingRow(**values)


def main() -> None:
    """The program: speaks the start-up protocol to its parent, then serves until the parent closes the death pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--death-fd", type=int, required=True)
    arguments = parser.parse_args()
    watch = ParentWatch(arguments.death_fd, 5.0, lambda: None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    launch = new_socket(context, zmq.DEALER)
    connect(launch, arguments.connect)
    launch.send(encode(Hello("core", PROTOCOL_VERSION, os.getpid(), arguments.name)))
    decoder: Decoder[ParentToCore] = Decoder(ParentToCore)
    poller = zmq.Poller()
    poller.register(watch.fd, zmq.POLLIN)
    poller.register(launch, zmq.POLLIN)
    if any(ready == watch.fd for ready, _ in poller.poll()):
        return
    configuration = decoder.decode(launch.recv())
    poller.unregister(launch)
    assert isinstance(configuration, ConfigureCore)
    kind = pathlib.Path(configuration.config.model).name.partition("-")[0]
    if kind == "exit":
        os._exit(7)
    if kind == "fail":
        launch.send(
            encode(Failed("worker-0", "ModelError", "no such tensor: lm_head.weight", "Traceback: of the worker"))
        )
        launch.close(linger=2000)
        context.term()
        return
    if kind != "interrupt":
        endpoint = configuration.listen or f"ipc://{configuration.runtime_dir}/frontends"
        with FakeCore(endpoint, model=configuration.config.model) as core:
            core.die_on_request = kind == "die"
            phases = [PhaseTime("core", "bind", 0.1, 0.1), PhaseTime("worker-0", "load weights", 0.2, 0.1)]
            launch.send(encode(CoreReady(core.endpoint, phases, [MemoryUse("weights", 5 * 2**20)])))
            poller.poll()
    else:
        os.kill(os.getppid(), signal.SIGINT)
        poller.poll()
    launch.close()
    context.term()


if __name__ == "__main__":
    main()
