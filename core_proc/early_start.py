"""What the core does before it imports the rest of itself: it starts the worker, whose own start takes longest.

The worker is told its configuration when the core knows it, and imports torch until then. Its socket lies in the
parent's runtime folder, or in one that is made here where the parent's socket lies elsewhere.
"""

import os
import pathlib
import time
from dataclasses import dataclass

import zmq

from folovllm.common.transport import make_runtime_dir, runtime_dir_of
from folovllm.core_proc.worker_link import WorkerLink


@dataclass(frozen=True, slots=True)
class EarlyStart:
    """What is there by now.

    Attributes:
        context: of all sockets of the core.
        runtime_dir: folder of the worker's socket; the core removes it when it ends.
        started_at: begin of the process, in seconds since 1970.
        seconds: from there until the worker was started.
        worker: None where it could not be started.
        failure: why not; the parent is told once it is connected.
    """

    context: "zmq.Context[zmq.Socket[bytes]]"
    runtime_dir: pathlib.Path
    started_at: float
    seconds: float
    worker: WorkerLink | None
    failure: Exception | None


def start_early(parent_endpoint: str, worker_module: str, started_at: float) -> EarlyStart:
    """Starts `python -m worker_module` for the core that dials `parent_endpoint`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    runtime_dir = runtime_dir_of(parent_endpoint) or make_runtime_dir(os.getpid())
    worker, failure = None, None
    try:
        worker = WorkerLink(context, runtime_dir, worker_module)
    except Exception as error:  # noqa: BLE001 - raised once there is somebody to be told
        failure = error
    return EarlyStart(context, runtime_dir, started_at, time.time() - started_at, worker, failure)
