"""Every message survives its link, and nothing but a message does."""

import random
from types import ModuleType
from typing import Any

import msgspec
import pytest

from folovllm.common.config import EngineConfig
from folovllm.common.errors import ProtocolError
from folovllm.common.messages import core_worker, frontend_core, lifecycle
from folovllm.common.messages.core_worker import (
    CoreToWorker,
    Logprobs,
    ModelRunnerOutput,
    NewRequest,
    PromptLogprobs,
    SamplingRow,
    SchedulerOutput,
    WorkerToCore,
)
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
    FrontendToCore,
    GetSnapshot,
    GetStats,
    Grammar,
    Ping,
    RejectedRequest,
    RequestPromptLogprobs,
    RequestSnapshot,
    ResetPrefixCache,
    StepSnapshot,
    Welcome,
)
from folovllm.common.messages.lifecycle import (
    BadFrame,
    ConfigureCore,
    ConfigureWorker,
    CoreReady,
    CoreToParent,
    Failed,
    Hello,
    MemoryUse,
    ParentToCore,
    PhaseTime,
    WorkerReady,
)
from folovllm.common.transport import Decoder, encode

IDS = b"\x01\x00\x00\x00\xff\xff\xff\x7f"
CONFIG = EngineConfig(model="/m", max_model_len=77, kv_cache_memory_gb=0.5)
PHASES = [PhaseTime("core", "import", 0.25, 1.5)]
MEMORY = [MemoryUse("weights", 2**40)]
SAMPLING = SamplingRow(
    *(0.7, 40, 0.9, 0.05, -(2**63), 3, 5, IDS, 0.5, -0.5, 1.1, IDS, IDS, IDS, [IDS], -1, 2, [("m:f", "{}")])
)
GRAMMAR = Grammar("regex", "[ä-ö]+")
REQUEST = EngineCoreRequest(
    *(2**31 - 1, "täst", IDS, SAMPLING, 100, 4, -3, True, 2.5, GRAMMAR, "tenant", True),
)
LOGPROBS = Logprobs(IDS, IDS, IDS, IDS)
FINISHED = FinishedRequest(3, "stop", 7, IDS, 16, 1, 0.1, 0.2, 0.3, "text")
REJECTED = RejectedRequest(4, "queue_full", "full", "n", 2.5)

RUNNING = RequestSnapshot(0, 5, "running", -1, 7, 9, 8, 4, 100, 1, 2.5)
SNAPSHOT = EngineSnapshot(3, EngineStats(*range(17)), 64, [RUNNING], [StepSnapshot(8, 2, 60, 0.25)], b"\0\1\2\3", 1)
LINKS: list[tuple[Any, list[msgspec.Struct]]] = [
    (
        ParentToCore,
        [
            ConfigureCore(CONFIG, "/run", "tcp://*:0", 1.5),
            ConfigureCore(EngineConfig(model="m"), "/r"),
            BadFrame("why"),
        ],
    ),
    (
        CoreToParent,
        [
            Hello("core", 1, 12, "core"),
            CoreReady("ipc:///x", PHASES, MEMORY),
            Failed("core", "ModelError", "m", "Traceback"),
        ],
    ),
    (
        CoreToWorker,
        [
            ConfigureWorker(CONFIG, 0, 4096, 2.5),
            SchedulerOutput(0, b""),
            SchedulerOutput(9, IDS, IDS, [NewRequest(1, IDS, 2, 1, IDS, SAMPLING)], *[IDS] * 5),
        ],
    ),
    (
        WorkerToCore,
        [
            WorkerReady(64, "cpu", "bfloat16", "paged", PHASES, MEMORY),
            ModelRunnerOutput(5, IDS, IDS),
            ModelRunnerOutput(6, error="out of memory"),
            ModelRunnerOutput(7, IDS, b"", "", IDS, LOGPROBS, [PromptLogprobs(1, 2, LOGPROBS)]),
        ],
    ),
    (
        FrontendToCore,
        [
            AddRequests([]),
            AddRequests([REQUEST, REQUEST]),
            AbortRequests(IDS),
            GetStats(2**40),
            GetSnapshot(2**40),
            ResetPrefixCache(2**40),
        ],
    ),
    (
        CoreToFrontend,
        [
            Welcome("m", 4096, 1000, 16, 63, 256, "cpu", "float32", "0.1"),
            EngineCoreOutputs(),
            EngineCoreOutputs(IDS, IDS, [FINISHED], [REJECTED], IDS, LOGPROBS, [RequestPromptLogprobs(1, 2, LOGPROBS)]),
            EngineStats(*range(18)),
            SNAPSHOT,
            Ping(),
            EngineFailed("gone"),
        ],
    ),
]
CASES = [pytest.param(link, message, id=f"{type(message).__name__}") for link, group in LINKS for message in group]


def _structs(module: ModuleType) -> set[type]:
    return {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
    }


@pytest.mark.parametrize(("link", "message"), CASES)
def test_round_trip(link: Any, message: msgspec.Struct) -> None:
    decoded: msgspec.Struct = Decoder[msgspec.Struct](link).decode(encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


def test_every_struct_is_among_the_cases() -> None:
    inside = {SamplingRow, NewRequest, EngineCoreRequest, FinishedRequest, RejectedRequest, PhaseTime, MemoryUse}
    inside |= {Grammar, Logprobs, PromptLogprobs, RequestPromptLogprobs, RequestSnapshot, StepSnapshot}
    covered = inside | {type(message) for _, group in LINKS for message in group}
    assert _structs(core_worker) | _structs(frontend_core) | _structs(lifecycle) == covered


@pytest.mark.parametrize(("link", "message"), CASES)
def test_cut_off_and_lengthened_frames_are_refused(link: Any, message: msgspec.Struct) -> None:
    decoder = Decoder[msgspec.Struct](link)
    frame = encode(message)
    for end in range(len(frame)):
        with pytest.raises(ProtocolError):
            decoder.decode(frame[:end])
    with pytest.raises(ProtocolError):
        decoder.decode(frame + b"\x00")


@pytest.mark.parametrize(("link", "message"), CASES)
def test_a_changed_byte_gives_a_message_or_a_protocol_error(link: Any, message: msgspec.Struct) -> None:
    decoder = Decoder[msgspec.Struct](link)
    generator = random.Random(7)
    frame = encode(message)
    num_refused = 0
    for position in range(len(frame)):
        broken = bytearray(frame)
        broken[position] = generator.randrange(256)
        try:
            assert isinstance(decoder.decode(bytes(broken)), msgspec.Struct)
        except ProtocolError:
            num_refused += 1
    assert num_refused > 0


@pytest.mark.parametrize("link", [link for link, _ in LINKS], ids=lambda link: str(link)[:40])
def test_random_bytes_are_refused(link: Any) -> None:
    decoder = Decoder[msgspec.Struct](link)
    generator = random.Random(11)
    for _ in range(1000):
        with pytest.raises(ProtocolError):
            decoder.decode(generator.randbytes(generator.randrange(64)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc0",
        msgspec.msgpack.encode(["unknown", 1]),
        msgspec.msgpack.encode({"type": "ping"}),
        msgspec.msgpack.encode(["get-stats", "1"]),
        msgspec.msgpack.encode(["get-stats", 1.5]),
        msgspec.msgpack.encode(["get-stats"]),
        msgspec.msgpack.encode(["abort", "text for bytes"]),
        msgspec.msgpack.encode(["add", [["x"]]]),
        b"\x92\xa3add\xdd\xff\xff\xff\xff",  # a list that says it has four thousand million entries
        b"\x92\xa3add" + b"\x91" * 100_000,  # lists in lists
        b"\x95\xa5hello\xa8frontend\x01\x01\xa1\xff",  # a name that is no UTF-8
    ],
)
def test_what_is_no_message_of_the_link_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder[msgspec.Struct](FrontendToCore).decode(frame)


def test_a_message_of_another_link_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Invalid value 'ping'"):
        Decoder[msgspec.Struct](FrontendToCore).decode(encode(Ping()))


def test_options_are_checked_where_they_arrive() -> None:
    frame = encode(ConfigureCore(CONFIG, "/run")).replace(b"\x4d", b"\x01")  # max_model_len 77 becomes 1
    with pytest.raises(ProtocolError, match="max_model_len=1 is out of range"):
        Decoder[msgspec.Struct](ParentToCore).decode(frame)


def test_a_step_of_decodes_takes_four_bytes_for_each_request() -> None:
    slots = IDS * 128
    assert len(encode(SchedulerOutput(2**40, slots))) <= len(slots) + 40
    assert len(encode(ModelRunnerOutput(2**40, slots))) <= len(slots) + 40
    assert len(encode(EngineCoreOutputs(slots, slots))) <= 2 * len(slots) + 40
