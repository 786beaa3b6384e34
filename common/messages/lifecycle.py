"""Start, readiness and end of a process: the link between a child and the parent that started it."""

from typing import Literal

import msgspec

from folovllm.common.config import EngineConfig

PROTOCOL_VERSION = 1
Role = Literal["core", "worker", "frontend"]


class Hello(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="hello"):
    """First message of every peer.

    Attributes:
        role: what the peer is.
        protocol: `PROTOCOL_VERSION` of the peer; both sides must agree.
        pid: process id of the peer, for logs.
        name: name of the peer in logs, such as "worker-0".
    """

    role: Role
    protocol: int
    pid: int
    name: str


class ConfigureCore(msgspec.Struct, array_like=True, frozen=True, tag="configure-core"):
    """Parent → core: everything the core needs to start.

    Attributes:
        config: the engine's options.
        runtime_dir: folder (mode 0700) of this engine's sockets; the core removes it when it ends.
        listen: endpoint on which frontends are served; "" chooses an ipc endpoint in `runtime_dir`.
        started_at: when the parent began to start the engine, in seconds since 1970; 0: unknown, phases then count
            from each process's own start.
    """

    config: EngineConfig
    runtime_dir: str
    listen: str = ""
    started_at: float = 0.0


class ConfigureWorker(msgspec.Struct, array_like=True, frozen=True, tag="configure-worker"):
    """Core → worker: everything the worker needs to start.

    Attributes:
        config: the engine's options.
        rank: index of this worker among the engine's workers.
        max_model_len: longest prompt + output in tokens, resolved.
        started_at: ConfigureCore's.
    """

    config: EngineConfig
    rank: int
    max_model_len: int
    started_at: float = 0.0


class PhaseTime(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One row of the start-up table: seconds spent in one phase of one process.

    Attributes:
        process: "frontend", "core" or "worker-0".
        phase: what was done, such as "import torch" or "load weights".
        start_s: seconds from the parent's start of the engine to the phase's begin (wall clock).
        seconds: how long it took.
    """

    process: str
    phase: str
    start_s: float
    seconds: float


class MemoryUse(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One row of the start-up table: bytes used for one purpose.

    Attributes:
        purpose: such as "weights" or "KV cache".
        num_bytes: how many.
    """

    purpose: str
    num_bytes: int


class WorkerReady(msgspec.Struct, array_like=True, frozen=True, tag="worker-ready"):
    """Worker → core: the model is loaded and steps may come.

    Attributes:
        num_blocks: KV blocks the worker holds, block 0 (never handed out) included.
        device: the device in words, such as "cpu (2 threads)".
        dtype: type of weights and KV cache.
        attention_backend: the backend chosen.
        phases: seconds for each phase of the worker's start.
        memory: bytes by purpose.
    """

    num_blocks: int
    device: str
    dtype: str
    attention_backend: str
    phases: list[PhaseTime]
    memory: list[MemoryUse]


class CoreReady(msgspec.Struct, array_like=True, frozen=True, tag="core-ready"):
    """Core → parent: frontends may dial.

    Attributes:
        endpoint: where frontends dial, as bound.
        phases: seconds for each phase, the core's and its workers'.
        memory: bytes by purpose.
    """

    endpoint: str
    phases: list[PhaseTime]
    memory: list[MemoryUse]


class Failed(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="failed"):
    """Child → parent: the child cannot start, or cannot go on, and ends.

    Attributes:
        process: name of the process that failed; the core passes a worker's failure on as it is.
        error_type: class of the exception, such as "ModelError".
        message: the exception's text: what the parent shows first.
        traceback: the traceback as text.
    """

    process: str
    error_type: str
    message: str
    traceback: str


class BadFrame(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="bad-frame"):
    """Any → any: the answer to a frame that was refused.

    Attributes:
        reason: what was wrong with it; for people.
    """

    reason: str


ParentToCore = ConfigureCore | BadFrame
CoreToParent = Hello | CoreReady | Failed | BadFrame
