"""A child for tests of child processes: `python -m tests.fakes.child_program MODE FILE [--death-fd N]`.

It writes its pid into FILE once it is as far as it will come; MODE says what it does then.
"""

import argparse
import os
import pathlib
import select
import signal
import sys

from folovllm.common.child_process import ParentWatch, die_with_parent_thread
from folovllm.common.stop_signals import StopSignals


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--death-fd", type=int, required=True)
    options = parser.parse_args()
    if options.mode == "exit-7":
        return 7
    will = options.file.with_suffix(".will")
    signals = StopSignals() if options.mode == "signals" else None
    if options.mode == "kernel":
        die_with_parent_thread()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    elif options.mode in ("orderly", "stuck"):
        grace_s = 0.3 if options.mode == "stuck" else 60.0  # a busy machine does not end an orderly one by force
        watch = ParentWatch(options.death_fd, grace_s, lambda: will.write_text("not the last one"))
        watch.set_last_will(lambda: will.write_text("done"))
    options.file.with_suffix(".part").write_text(str(os.getpid()))
    options.file.with_suffix(".part").rename(options.file)
    match options.mode:
        case "orderly":
            select.select([options.death_fd], [], [])
            return 0
        case "signals":
            assert signals is not None
            select.select([signals.fd], [], [])
            codes = {signals.exit_code(), signals.exit_code()}
            signals.ignore()
            os.kill(os.getpid(), signal.SIGTERM)
            return codes.pop() if len(codes) == 1 else 1
        case _:
            signal.pause()
    return 1


if __name__ == "__main__":
    sys.exit(main())
