"""Engines for the integration tests: all three processes, a tiny model with random weights, one engine per module."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest

from folovllm import LLM, SamplingParams
from tests.fakes.model_folder import IM_END, NUM_IDS, write_model_folder, write_tokenizer
from tests.fakes.tiny_models import make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 100.0
END_TIMEOUT_S = 60.0
# Bytes that are in no text, nor in what a grammar allows: control characters, and those that UTF-8 has no use for.
NO_TEXT = [*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF5, 0x100)]
TINY = ("--load-format", "dummy", "--dtype", "float32", "--num-gpu-blocks-override", "257", "--cpu-threads", "1")
# For what must still be at work when a test that was held up gets round to it: 500 tokens are there in half a second.
ENDLESS = SamplingParams(max_tokens=65_000, ignore_eos=True)
ENDLESS_BODY = {"prompt": "abc", "max_tokens": ENDLESS.max_tokens, "ignore_eos": True}
ROOM = ("--num-gpu-blocks-override", "4200")  # for one such answer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A sixth of what the model may say ends an answer: a test that counts tokens without `ignore_eos` fails at once.

    With one such id of 259, twenty answers of two tokens failed one run in eight, and looked like a wrong count.
    """
    return write_model_folder(tmp_path_factory.mktemp("integration") / "tiny", eos_token_id=[IM_END, *NO_TEXT])


@pytest.fixture(scope="session")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny model, with room for an answer that no test waits to the end of."""
    folder = tmp_path_factory.mktemp("roomy") / "tiny"
    return write_model_folder(folder, eos_token_id=[IM_END, *NO_TEXT], max_position_embeddings=65_536)


def tiny_llm(folder: pathlib.Path, max_worker_restarts: int = 10, num_blocks: int = 257) -> LLM:
    """An engine of its own for the tiny model: blocks of 16 tokens."""
    return LLM(
        folder,
        load_format="dummy",
        dtype="float32",
        num_gpu_blocks_override=num_blocks,
        cpu_threads=1,
        max_worker_restarts=max_worker_restarts,
    )


@pytest.fixture(scope="module")
def llm(tiny_folder: pathlib.Path) -> Iterator[LLM]:
    with tiny_llm(tiny_folder) as made:
        yield made


class Daemon:
    """`folovllm engine` as a process."""

    def __init__(self, folder: pathlib.Path, endpoint: str, *options: str) -> None:
        self.endpoint = endpoint
        command = [sys.executable, "-m", "folovllm", "engine", str(folder), "--listen", endpoint, *TINY, *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []

    def wait_ready(self) -> None:
        """Reads what it prints up to the line that says how to connect."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready"):
                self.endpoint = line.split("'")[1]
                return
        raise AssertionError(f"the engine ended: {self.process.communicate()[1]}")

    def family(self) -> list[psutil.Process]:
        """Its processes: the command itself, the core, the worker."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def end(self, number: int) -> tuple[int, str, list[psutil.Process]]:
        """Sends a signal and waits; returns exit code, stderr, and its processes that outlived it."""
        family = self.family()
        self.process.send_signal(number)
        return self.outcome(family)

    def outcome(self, family: Sequence[psutil.Process]) -> tuple[int, str, list[psutil.Process]]:
        _, errors = self.process.communicate(timeout=END_TIMEOUT_S)
        return self.process.returncode, errors, left_of(family)

    def close(self) -> None:
        """Ends whatever is left, for a test that failed half way."""
        if self.process.poll() is None:
            kill_all(self.family())
        self.process.communicate()


@pytest.fixture
def start_daemon(tiny_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons that are gone after the test."""
    started: list[Daemon] = []

    def start(*options: str, folder: pathlib.Path = tiny_folder, endpoint: str = "") -> Daemon:
        started.append(Daemon(folder, endpoint or f"ipc://{tmp_path}/engine{len(started)}", *options))
        return started[-1]

    yield start
    for daemon in started:
        daemon.close()


@pytest.fixture(scope="module")
def daemon(tiny_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tiny_folder, f"ipc://{tmp_path_factory.mktemp('daemon')}/engine")
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def left_of(family: Sequence[psutil.Process], timeout_s: float = 30.0) -> list[psutil.Process]:
    """Those that do not end: five seconds are the promise, but a machine may be held up. They are killed."""
    _, left = psutil.wait_procs(family, timeout=timeout_s)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    kill_all(left)
    return left


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Those whose parent was killed just before may be gone by themselves."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def runtime_dirs(pid: int, base: str = "/tmp") -> list[pathlib.Path]:
    """Runtime folders of the process `pid`."""
    return list(pathlib.Path(os.environ.get("TMPDIR", base)).glob(f"folovllm-{pid}-*"))


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Asks again and again, within a bound. `condition` is itself a round trip, so this does not spin."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True


def is_idle(llm: LLM) -> bool:
    """No request is left in the core, and all blocks are free."""
    stats = llm.get_stats()
    return stats.num_running == stats.num_waiting == stats.tokens_in_use == 0 and (
        stats.num_free_blocks == stats.num_blocks
    )


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny Qwen3 with weights that transformers knows too; ids 0 to 255 are bytes, 1 ends an answer."""
    made = make_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3", vocab_size=NUM_IDS)
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def qwen3_llm(qwen3_folder: pathlib.Path) -> Iterator[LLM]:
    with LLM(qwen3_folder, dtype="float32", num_gpu_blocks_override=257, cpu_threads=1) as made:
        yield made
