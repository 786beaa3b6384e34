"""What holds for every test: no hub, repeatable Hypothesis runs, GPU tests only with CUDA, no process left over."""

import logging
import os
from collections.abc import Iterator

import hypothesis
import psutil
import pytest

# Before any test module loads a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The oracle's threads must not spin for milliseconds while the engine's want the cores (see `child_environment`).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

pytest_plugins = ["tests.fakes.models"]

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

_LAST_GRACE_S = 30.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device; torch is loaded only if there are such tests."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # costs seconds, and most runs have no GPU test

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A test that sets logging up, as a process's main does, does not change what later tests capture."""
    logger = logging.getLogger("folovllm")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """Fails the run if a child process is still there after every test and every fixture has cleaned up."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, left = psutil.wait_procs(started, timeout=_LAST_GRACE_S)
    commands = [" ".join(process.cmdline()) for process in left if process.is_running()]
    for process in left:
        process.kill()
    assert not commands, f"child processes outlived the tests: {commands}"
