"""The core's program: `python -m folovllm.core_proc --connect ENDPOINT [--name core] [--death-fd N]`.

It starts its worker, dials its parent at ENDPOINT, says Hello, is sent a ConfigureCore, tells the worker what it needs
of it, reports CoreReady or Failed, and serves frontends until it is told to end. Without `--death-fd` it runs on its
own and ends by SIGTERM or SIGINT.

Another worker can take the place of FoloVLLM's: `--worker-module MODULE` is started as `python -m MODULE --connect
ENDPOINT --name worker-0 --death-fd N` and speaks `folovllm.common.messages.core_worker` (a fake one is in
`tests/fakes/fake_worker.py`).

Exit codes: 0 the parent asked for the end or is gone, 1 failed (reported and logged), 130 SIGINT, 143 SIGTERM.
"""

import argparse
import sys
import time

from folovllm.common.child_process import ParentWatch
from folovllm.common.kept_imports import kept_imports
from folovllm.common.stop_signals import StopSignals

_GRACE_S = 3.5  # from the parent's end to the forced end of this process, if the orderly one takes longer


def main() -> int:
    """The whole life of a core process; returns its exit code."""
    started_at = time.time()
    signals = StopSignals()
    parser = argparse.ArgumentParser(prog="python -m folovllm.core_proc")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="where the parent listens")
    parser.add_argument("--name", default="core", help="name of this process in logs")
    parser.add_argument("--death-fd", type=int, metavar="N", help="inherited pipe that ends with the parent")
    parser.add_argument("--worker-module", default="folovllm.worker_proc", metavar="MODULE", help="worker to start")
    options = parser.parse_args()
    watch = ParentWatch(options.death_fd, _GRACE_S, lambda: None) if options.death_fd is not None else None

    # What costs time to import comes after the watch: the parent may end in the meantime.
    with kept_imports():
        from folovllm.core_proc.early_start import start_early

        early = start_early(options.connect, options.worker_module, started_at)
        from folovllm.core_proc.core_process import CoreProcess
        from folovllm.core_proc.parent_link import ParentLink
        from folovllm.core_proc.waiter import Waiter

    waiter = Waiter(watch, signals)
    exit_code = CoreProcess(
        ParentLink(options.connect, options.name, waiter),
        waiter,
        name=options.name,
        early=early,
        watch=watch,
    ).run()
    signals.ignore()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
