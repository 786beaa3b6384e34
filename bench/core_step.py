"""What one decode step costs the core, alone and over its sockets, with a worker that answers at once.

    python -m bench.core_step [--steps 500]

First table: the parts of a step in one process, without sockets: schedule, encode the step, decode the result, update,
encode the outputs for one streaming frontend. Second table: real core and worker processes; the time between two steps'
tokens as a frontend sees it. With one request and depth 1 that is the round trip core → worker → core.
"""

import argparse
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

import numpy as np
import zmq

from bench.common import print_table, write_json
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, WorkerToCore
from folovllm.common.messages.frontend_core import Welcome
from folovllm.common.messages.lifecycle import PROTOCOL_VERSION, Hello
from folovllm.common.transport import Decoder, encode
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.frontends import Frontends
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.request import Request
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import Scheduler, StepOutcome
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent, make_model_dir
from tests.fakes.fake_worker import FastModel, Script

BATCHES = (1, 16, 64, 256)
DEPTHS = (1, 2)
PARTS = ("schedule", "encode", "decode", "update", "send")
_PROMPT_TOKENS = 16
_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 8192
_WARM_UP_STEPS = 50


class _OneFrontendSocket:
    """Stands for the ROUTER socket: one Hello lies in it, and what is sent is dropped."""

    def __init__(self) -> None:
        self._frames = [[b"frontend", encode(Hello("frontend", PROTOCOL_VERSION, 1, "bench"))]]

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self._frames:
            raise zmq.Again
        return self._frames.pop()

    def send_multipart(self, _frames: Sequence[bytes], _flags: int) -> None:
        return


class _InProcessCore:
    """A core's parts without its sockets; `step` says how long each took."""

    def __init__(self, num_requests: int, depth: int, num_steps: int) -> None:
        num_blocks = num_requests * (2 + (_PROMPT_TOKENS + num_steps) // _BLOCK_SIZE) + 64
        self._scheduler = Scheduler(
            kv_cache_manager=KVCacheManager(BlockPool(num_blocks), _BLOCK_SIZE),
            queue=RequestQueue("fcfs"),
            max_num_seqs=num_requests,
            max_num_batched_tokens=max(num_requests * _PROMPT_TOKENS, 2048),
            max_model_len=_MAX_MODEL_LEN,
        )
        welcome = Welcome("bench", _MAX_MODEL_LEN, 1000, _BLOCK_SIZE, num_blocks, num_requests, "fake", "float32", "")
        self._frontends = Frontends(_OneFrontendSocket(), welcome)  # type: ignore[arg-type]
        assert not list(self._frontends.receive())
        self._decoder: Decoder[WorkerToCore] = Decoder(WorkerToCore)
        self._model = FastModel()
        self._depth = depth
        self._in_flight: deque[bytes] = deque()
        prompt = np.arange(_PROMPT_TOKENS, dtype=np.int32)
        for number in range(num_requests):
            request = Request(0, number, "bench", prompt, SamplingRow(), max_tokens=num_steps + 100, stream=True)
            self._scheduler.add_request(request)

    def step(self) -> list[int]:
        """One step as `EngineCore.step` does it; nanoseconds for each of PARTS."""
        times = [0] * len(PARTS)
        while len(self._in_flight) < self._depth:
            begun = time.perf_counter_ns()
            step = self._scheduler.schedule(0.0)
            scheduled = time.perf_counter_ns()
            if step is None:
                break
            encode(step)
            times[1] += time.perf_counter_ns() - scheduled
            times[0] += scheduled - begun
            self._in_flight.append(encode(self._model.execute(step)))
        frame = self._in_flight.popleft()
        begun = time.perf_counter_ns()
        output = self._decoder.decode(frame)
        decoded = time.perf_counter_ns()
        assert isinstance(output, ModelRunnerOutput)
        outcome: StepOutcome = self._scheduler.update_from_output(output, 0.0)
        updated = time.perf_counter_ns()
        self._frontends.send_outcome(outcome)
        times[2:] = (decoded - begun, updated - decoded, time.perf_counter_ns() - updated)
        return times


def measure_parts(num_requests: int, depth: int, num_steps: int) -> dict[str, Any]:
    """Median microseconds of each part of a step, and of the whole."""
    core = _InProcessCore(num_requests, depth, num_steps + _WARM_UP_STEPS)
    for _ in range(_WARM_UP_STEPS):
        core.step()
    times = [core.step() for _ in range(num_steps)]
    parts = {part: _microseconds(row[i] for row in times) for i, part in enumerate(PARTS)}
    return {"requests": num_requests, "depth": depth, **parts, "core_us": _microseconds(sum(row) for row in times)}


def measure_over_sockets(num_requests: int, depth: int, num_steps: int) -> dict[str, Any]:
    """Mean and 99th percentile of the microseconds between two steps' tokens, as a frontend sees them."""
    num_blocks = num_requests * (2 + (_PROMPT_TOKENS + num_steps + _WARM_UP_STEPS) // _BLOCK_SIZE) + 64
    with tempfile.TemporaryDirectory() as folder:
        script = Script(num_blocks=num_blocks, check=False)
        model_dir = make_model_dir(pathlib.Path(folder) / "model", script, _MAX_MODEL_LEN)
        config = EngineConfig(model=str(model_dir), pipeline_depth=depth, log_level="warning")
        with FakeParent() as parent, FakeFrontend(parent.start(config).endpoint) as frontend:
            max_tokens = num_steps + _WARM_UP_STEPS
            prompt = list(range(_PROMPT_TOKENS))
            frontend.add(*(make_request(i, prompt, max_tokens, stream=True) for i in range(num_requests)))
            arrivals = []
            while len(frontend.finished) < num_requests:
                frontend.receive()
                arrivals.append(time.perf_counter_ns())
    intervals = sorted(after - before for before, after in itertools.pairwise(arrivals[_WARM_UP_STEPS:]))
    p99 = intervals[int(len(intervals) * 0.99)] / 1000
    return {
        "requests": num_requests,
        "depth": depth,
        "step_us": round(statistics.mean(intervals) / 1000, 1),
        "p99_us": round(p99, 1),
    }


def _microseconds(nanoseconds: Iterable[int]) -> float:
    return round(statistics.median(nanoseconds) / 1000, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps measured for each row")
    num_steps = parser.parse_args().steps
    cases = [(batch, depth) for depth in DEPTHS for batch in BATCHES]
    parts = [measure_parts(batch, depth, num_steps) for batch, depth in cases]
    sockets = [measure_over_sockets(batch, depth, num_steps) for batch, depth in cases]
    print("Median microseconds of core time for one decode step, without sockets:")
    print_table(list(parts[0]), [list(row.values()) for row in parts])
    print("\nMicroseconds from one step's tokens to the next at the frontend, real processes:")
    print_table(list(sockets[0]), [list(row.values()) for row in sockets])
    write_json("core_step", {"parts": parts, "sockets": sockets})


if __name__ == "__main__":
    main()
