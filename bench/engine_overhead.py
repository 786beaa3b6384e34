"""What an engine adds to its steps: `LLM.generate` against a bare loop over the worker's own runner, by turns.

    python -m bench.engine_overhead [--batches 1 64]

The bare loop is a process with the worker's environment, which builds the runner as the worker does and computes the
same steps one after another: no core, no frontend, no sockets, no scheduling. What is timed are the decode steps, of
`LLM.generate` as the difference of a long and a short answer. The overhead is the median of each turn's own ratio.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.common import machine, print_table, write_json
from bench.server_overhead import ROOT
from bench.workload import exactly, parser, random_prompts
from folovllm import LLM
from folovllm.common.config import child_environment
from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker
from folovllm.frontend.engine_options import make_config
from folovllm.frontend.model_hub import resolve

GOALS_PERCENT = {1: 4.0, 64: 8.0}
_BLOCK_SIZE = 16
_PROMPTS_PER_STEP = 16
_MAX_LEN = 1024


@dataclass(frozen=True)
class Point:
    """Medians over the turns, in milliseconds a step, and by how much the engine's is longer."""

    batch: int
    bare_ms: float
    engine_ms: float
    overhead_percent: float


def steps_of(prompts: Sequence[Sequence[int]], num_decodes: int) -> Iterator[SchedulerOutput]:
    """Steps such as the core sends: those of the prompts, then `num_decodes` of one token for each request."""
    num_blocks = -(-(len(prompts[0]) + 1 + num_decodes) // _BLOCK_SIZE)
    for first in range(0, len(prompts), _PROMPTS_PER_STEP):
        slots = range(first, min(first + _PROMPTS_PER_STEP, len(prompts)))
        new = [
            NewRequest(
                slot,
                _bytes(prompts[slot]),
                len(prompts[slot]),
                0,
                _bytes(range(1 + slot * num_blocks, 1 + (slot + 1) * num_blocks)),
                SamplingRow(),
            )
            for slot in slots
        ]
        yield SchedulerOutput(first, _bytes(slots), _bytes([len(prompts[slot]) for slot in slots]), new)
    for step_id in range(num_decodes):
        yield SchedulerOutput(step_id, _bytes(range(len(prompts))))


def _bytes(numbers: Sequence[int]) -> bytes:
    return np.asarray(numbers, "<i4").tobytes()


def serve_bare_loop(model: str, dtype: Any, max_num_seqs: int) -> None:
    """Answers each line of stdin (batch size, tokens of a prompt, steps, seed) with the milliseconds of a step."""
    from folovllm.worker_proc.phases import Phases
    from folovllm.worker_proc.startup import Startup

    blocks = 1 + max_num_seqs * _MAX_LEN // _BLOCK_SIZE
    config = make_config(
        resolve(model),
        {"dtype": dtype, "device": "cpu", "max_num_seqs": max_num_seqs, "num_gpu_blocks_override": blocks},
    )
    configure = ConfigureWorker(config, 0, _MAX_LEN)
    runner, _ = Startup(configure, Phases("bench", time.time()), lambda: None).run()
    print("ready", flush=True)
    for line in sys.stdin:
        batch, prompt_len, num_decodes, seed = map(int, line.split())
        steps = list(steps_of(random_prompts([prompt_len] * batch, seed), num_decodes))
        for step in steps[:-num_decodes]:
            runner.execute(step).wait()
        began = time.perf_counter()
        for step in steps[-num_decodes:]:
            runner.execute(step).wait()
        print(json.dumps((time.perf_counter() - began) / num_decodes * 1e3), flush=True)


class BareLoop:
    """The process of `serve_bare_loop`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._answer()

    def step_ms(self, batch: int, prompt_len: int, num_decodes: int, seed: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {prompt_len} {num_decodes} {seed}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the bare loop has ended")
        return line


@contextlib.contextmanager
def bare_loop(model: str, dtype: str, max_num_seqs: int) -> Iterator[BareLoop]:
    """A bare loop in a process of its own, with the environment that workers are given."""
    command = [sys.executable, "-m", "bench.engine_overhead", "--model", model, "--dtype", dtype]
    with subprocess.Popen(
        [*command, "--bare", str(max_num_seqs)],
        cwd=ROOT,
        env=child_environment(str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield BareLoop(process)
        finally:
            process.terminate()


def engine_step_ms(llm: LLM, batch: int, prompt_len: int, num_decodes: int, seed: int) -> float:
    """Milliseconds that each further token of all answers takes `LLM.generate`."""
    seconds = []
    for num_tokens in (1, 1 + num_decodes):
        prompts = random_prompts([prompt_len] * batch, seed + num_tokens)
        began = time.perf_counter()
        llm.generate(prompts, exactly(num_tokens), use_tqdm=False)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / num_decodes * 1e3


def measure(llm: LLM, loop: BareLoop, batch: int, given: argparse.Namespace) -> Point:
    """Both ways by turns; which one begins changes with each turn."""
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for turn in range(-1, given.repeats):  # the first warms up
        seed = given.seed + 1000 * batch + 10 * turn
        for way in ("bare", "engine") if turn % 2 else ("engine", "bare"):
            size = batch, given.prompt_len, given.output_len, seed
            step_ms = loop.step_ms(*size) if way == "bare" else engine_step_ms(llm, *size)
            if turn >= 0:
                times[way].append(step_ms)
    shares = [engine / bare for engine, bare in zip(times["engine"], times["bare"], strict=True)]
    bare_ms, engine_ms = (statistics.median(times[way]) for way in ("bare", "engine"))
    return Point(batch, bare_ms, engine_ms, 100 * (statistics.median(shares) - 1))


def main() -> None:
    options = parser("LLM.generate against a bare loop over its steps.")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    options.add_argument("--prompt-len", type=int, default=16)
    options.add_argument("--output-len", type=int, default=32)
    options.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options.set_defaults(repeats=9)  # short ones: what else the machine does changes from second to second
    given = options.parse_args()
    if given.bare is not None:
        serve_bare_loop(given.model, given.dtype, given.bare)
        return
    if given.quick:
        given.batches, given.output_len, given.repeats = [1, 2], 4, 1
    engine = {"dtype": given.dtype, "device": "cpu", "enable_prefix_caching": False, "max_model_len": _MAX_LEN}
    with bare_loop(given.model, given.dtype, max(given.batches)) as loop, LLM(given.model, **engine) as llm:
        points = [measure(llm, loop, batch, given) for batch in given.batches]
    print(f"{given.prompt_len} + {given.output_len} tokens, {machine()['processor']}")
    goals = [f"{GOALS_PERCENT[p.batch]:.0f} %" if p.batch in GOALS_PERCENT else "" for p in points]
    rows = [
        [p.batch, f"{p.bare_ms:.2f}", f"{p.engine_ms:.2f}", f"{p.overhead_percent:.1f} %", goal]
        for p, goal in zip(points, goals, strict=True)
    ]
    print_table(["batch", "bare step, ms", "LLM.generate, ms", "overhead", "goal"], rows)
    result = {"points": [asdict(point) for point in points], "goals_percent": GOALS_PERCENT}
    write_json("engine_overhead-quick" if given.quick else "engine_overhead", {"options": vars(given), **result})


if __name__ == "__main__":
    main()
