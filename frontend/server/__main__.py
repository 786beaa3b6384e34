"""One server process of several: `python -m folovllm.frontend.server --options FILE --number N --death-fd N`.

It is started by `folovllm serve --api-server-count`, dials the engine and serves until its parent ends, or asks for the
end; then it drains. Exit codes: 0 the parent asked, 1 failed.
"""

import argparse
import pathlib
import signal
import sys

from folovllm.common.child_process import ParentWatch
from folovllm.common.config import share_metrics


def main() -> int:
    """The whole life of a child; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    parser = argparse.ArgumentParser(prog="python -m folovllm.frontend.server")
    parser.add_argument("--options", required=True, type=pathlib.Path, metavar="FILE", help="a ChildOptions as JSON")
    parser.add_argument("--number", required=True, type=int, help="which of the children this is")
    parser.add_argument("--death-fd", required=True, type=int, metavar="N", help="pipe that ends with the parent")
    parser.add_argument("--grace", required=True, type=float, metavar="S", help="seconds from the end's wish to force")
    arguments = parser.parse_args()
    watch = ParentWatch(arguments.death_fd, arguments.grace, lambda: None)
    share_metrics(str(arguments.options.parent))  # before prometheus_client is imported

    from folovllm.frontend.server.child import run_child

    return run_child(arguments.options.read_bytes(), arguments.number, watch.fd)


if __name__ == "__main__":
    sys.exit(main())
