"""The worker's program: `python -m folovllm.worker_proc --connect ENDPOINT [--name worker-0] [--death-fd N]`.

It dials the core at ENDPOINT, says Hello, is sent a ConfigureWorker, loads the model, reports WorkerReady or Failed,
and computes steps until it is told to end. Without `--death-fd` it runs on its own and ends by SIGTERM or SIGINT.

Exit codes: 0 the core asked for the end or is gone, 1 failed (reported and logged), 130 SIGINT, 143 SIGTERM.
"""

import argparse
import os
import select
import sys
import threading
import time

from folovllm.common.child_process import ParentWatch, die_with_parent_thread
from folovllm.common.kept_imports import kept_imports
from folovllm.common.stop_signals import StopSignals

# From the order to end to the forced end, if the orderly one takes longer. Before the loop runs, nothing polls: an
# import or the reading of weights is ended by force, and leaves nothing behind.
_GRACE_S = 1.5


def main() -> int:
    """The whole life of a worker process; returns its exit code."""
    started_at = time.time()
    signals = StopSignals()
    parser = argparse.ArgumentParser(prog="python -m folovllm.worker_proc")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="where the core listens")
    parser.add_argument("--name", default="worker-0", help="name of this process in logs, and its ZeroMQ identity")
    parser.add_argument("--death-fd", type=int, metavar="N", help="inherited pipe that ends with the core")
    options = parser.parse_args()
    watch = None
    if options.death_fd is not None:
        die_with_parent_thread()
        watch = ParentWatch(options.death_fd, _GRACE_S, lambda: None)
    threading.Thread(target=_end_by_force, args=(signals,), name="signal-watch", daemon=True).start()

    # What costs time to import comes after the watches: the order to end may come in the meantime.
    with kept_imports():
        from folovllm.worker_proc.core_link import CoreLink
        from folovllm.worker_proc.worker import Worker

    return Worker(CoreLink(options.connect, options.name, signals, watch), started_at).run()


def _end_by_force(signals: StopSignals) -> None:
    """Ends the process `_GRACE_S` after the first signal, should the main thread not have done it by then."""
    select.select([signals.fd], [], [])
    time.sleep(_GRACE_S)
    os._exit(signals.exit_code())


if __name__ == "__main__":
    sys.exit(main())
