"""One log line format for every process: time, level, process, message.

    14:03:22.118 INFO  core     KV pool: 4096 blocks of 16 tokens

Lines go to stderr, so that a program's own output on stdout stays clean.
"""

import logging
import sys
import time

from folovllm.common.errors import ConfigError

ROOT_NAME = "folovllm"
_LINES_PER_SECOND = 5
LEVELS = ("debug", "info", "warning", "error")


class _Formatter(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-5s {process_name:<8} %(message)s", "%H:%M:%S")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is the module's `__name__`, which starts with `folovllm.`."""
    return logging.getLogger(name)


class BoundedWarnings:
    """Warnings that a peer can cause at will: a few a second; what is left out is counted."""

    def __init__(self, logger: logging.Logger, prefix: str = "") -> None:
        self._logger = logger
        self._prefix = prefix
        self._second = 0
        self._lines = 0

    def warning(self, text: str) -> None:
        """Logs `text` behind the prefix, unless this second has had its lines."""
        second = int(time.monotonic())
        if second != self._second:
            if self._lines > _LINES_PER_SECOND:
                left_out = self._lines - _LINES_PER_SECOND
                self._logger.warning("%s%d more such lines left out", self._prefix, left_out)
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= _LINES_PER_SECOND:
            self._logger.warning("%s%s", self._prefix, text)


def check_level(level: str) -> str:
    """`level` in lower case. Raises ConfigError for a level that does not exist."""
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    return level.lower()


def setup_logging(process_name: str, level: str) -> None:
    """Sends FoloVLLM's log lines of this process to stderr; other libraries' logging is left alone."""
    root = logging.getLogger(ROOT_NAME)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(process_name))
    root.handlers[:] = [handler]
    root.setLevel(check_level(level).upper())
    root.propagate = False
