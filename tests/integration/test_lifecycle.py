"""The ends of an engine that an `LLM` started: each process killed, failed starts, interrupted starts, many starts."""

import os
import pathlib
import signal
import subprocess
import sys

import psutil
import pytest

from folovllm import LLM, EngineDeadError, EngineStartError, SamplingParams
from tests.fakes.model_folder import write_model_folder
from tests.integration.conftest import ENDLESS, ROOT, eventually, left_of, runtime_dirs, tiny_llm

LONG = SamplingParams(max_tokens=500, ignore_eos=True)


def family_of_engine() -> list[psutil.Process]:
    """Core and worker that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("folovllm." in part for part in child.cmdline())]


@pytest.mark.parametrize("victim", ["core", "worker"])
def test_L35_a_killed_process_raises_its_cause(roomy_folder: pathlib.Path, victim: str) -> None:
    llm = tiny_llm(roomy_folder, max_worker_restarts=0, num_blocks=4200)
    family = family_of_engine()
    (target,) = (process for process in family if f"folovllm.{victim}_proc" in process.cmdline())
    stream = llm.stream("abc", ENDLESS)
    next(stream)
    target.send_signal(signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        list(stream)
    with pytest.raises(EngineDeadError):
        llm.generate("abc", use_tqdm=False)
    llm.close()
    assert left_of(family) == []
    assert runtime_dirs(os.getpid()) == []


def test_close_ends_everything_and_again_a_new_engine_starts(tiny_folder: pathlib.Path) -> None:
    for _ in range(2):
        with tiny_llm(tiny_folder) as llm:
            stream = llm.stream("abc", LONG)
            next(stream)
            family = family_of_engine()
            assert len(family) == 2
        assert left_of(family) == []
        assert runtime_dirs(os.getpid()) == []


def test_a_failed_start_tells_the_workers_own_cause(tmp_path: pathlib.Path) -> None:
    folder = write_model_folder(tmp_path / "no-weights")
    before = family_of_engine()
    with pytest.raises(EngineStartError, match=r"ModelError in worker-0: .*safetensors") as caught:
        LLM(folder, cpu_threads=1)
    assert "Traceback" in str(caught.value.__cause__)
    assert family_of_engine() == before
    assert runtime_dirs(os.getpid()) == []


def test_a_wrong_option_of_the_core_is_named(tiny_folder: pathlib.Path) -> None:
    with pytest.raises(EngineStartError, match="ConfigError in core: max_model_len=9999 is more than"):
        LLM(tiny_folder, load_format="dummy", max_model_len=9999)
    assert runtime_dirs(os.getpid()) == []


SCRIPT = """
import sys
from folovllm import LLM
llm = LLM(sys.argv[1], load_format="dummy", dtype="float32", num_gpu_blocks_override=64, cpu_threads=1)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("phase", ["start", "ready"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_L35_a_script_that_is_ended_leaves_nothing(tiny_folder: pathlib.Path, phase: str, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        own = psutil.Process(process.pid)
        if phase == "ready":
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        else:
            assert eventually(lambda: len(own.children(recursive=True)) >= 2, timeout_s=60)
        family = [own, *own.children(recursive=True)]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -number
        assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0)  # Python's own, of the script
        assert left_of(family) == []
    assert runtime_dirs(process.pid) == []
