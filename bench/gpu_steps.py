"""Where a step's time goes on a GPU: the worker alone, in this process, without messages.

    python -m bench.make_model FOLDER && python -m bench.gpu_steps --model FOLDER

For each number of requests a decode step at a context of 320 to 400 tokens, and for each prompt length a prefill step:
`step_ms` is the pace of steps put one after another, `host_ms` what the main thread is busy with one, `busy_ms` the
time in which a kernel runs, and its parts by kind of kernel.
"""

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType

from bench.common import print_table, write_json
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.phases import Phases
from folovllm.worker_proc.startup import Startup

CONTEXT = 320
BLOCK = 16
STEPS = 60
MAX_MODEL_LEN = 17000
KINDS = {
    "attention": ("paged_decode", "paged_prefill", "flash", "fmha", "sdpa"),
    "heads, cache": ("rotate_heads", "write_to_cache"),
    "norm": ("rms_norm",),
    "activation": ("silu",),
    "sampling": ("find_largest", "find_thresholds", "sum_weights", "_pick", "reduce", "sort"),
    "products": ("gemv", "gemm", "nvjet", "cutlass", "splitK", "Kernel2"),
}


def ints(values: Any) -> bytes:
    """Little-endian int32, as messages carry them."""
    return np.asarray(values, "<i4").tobytes()


def new_requests(num_requests: int, prompt_len: int, room: int, sampling: SamplingRow) -> list[NewRequest]:
    """Requests with blocks of their own for `room` tokens."""
    per_request = -(-room // BLOCK)
    tokens = ints(np.random.default_rng(0).integers(100, 40000, prompt_len))
    return [
        NewRequest(slot, tokens, prompt_len, 0, ints(1 + slot * per_request + np.arange(per_request)), sampling)
        for slot in range(num_requests)
    ]


def measure_steps(runner: ModelRunner, steps: list[SchedulerOutput]) -> dict[str, Any]:
    """Figures of steps like these, of which at most two are in flight, as when serving."""
    host, ahead = [], []
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in steps:
        begun = time.perf_counter()
        ahead.append(runner.execute(step))
        host.append(time.perf_counter() - begun)
        if len(ahead) == 2:
            ahead.pop(0).wait()
    torch.cuda.synchronize()
    pace = (time.perf_counter() - start) / len(steps)
    return {"step_ms": pace * 1e3, "host_ms": statistics.median(host) * 1e3}


def profile_steps(runner: ModelRunner, steps: list[SchedulerOutput]) -> dict[str, Any]:
    """Milliseconds a step in which kernels run, by kind; overlapping launches count once each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for step in steps:
            runner.execute(step)
        torch.cuda.synchronize()
    kinds: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.device_type != DeviceType.CUDA:
            continue
        micros = float(event.device_time)
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), "other")
        kinds[kind] += micros / 1e3 / len(steps)
        names[event.name[:90]].append(micros)
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:14]
    return {
        "busy_ms": sum(kinds.values()),
        "kinds_ms": dict(kinds),
        "kernels": {name: [len(each) / len(steps), sum(each) / len(each)] for name, each in top},
    }


def decode(runner: ModelRunner, num_requests: int, sampling: SamplingRow) -> dict[str, Any]:
    """A decode step of so many requests around a context of `CONTEXT` tokens."""
    total = CONTEXT + 3 * STEPS
    requests = new_requests(num_requests, CONTEXT - STEPS, total, sampling)
    for first in range(0, num_requests, 32):
        part = requests[first : first + 32]
        part_slots = ints([request.slot for request in part])
        runner.execute(SchedulerOutput(0, part_slots, ints([CONTEXT - STEPS] * len(part)), part)).wait()
    slots = ints(range(num_requests))
    steps = [SchedulerOutput(index, slots) for index in range(2 * STEPS)]
    begun = time.perf_counter()
    measure_steps(runner, steps[:STEPS])  # captures; the contexts that follow need the same graphs
    first_s = time.perf_counter() - begun
    result = measure_steps(runner, steps[STEPS:])
    return result | profile_steps(runner, steps[:10]) | {"first_steps_s": first_s}


def prefill(runner: ModelRunner, num_requests: int, prompt_len: int) -> dict[str, Any]:
    """A step that computes whole prompts."""
    requests = new_requests(num_requests, prompt_len, prompt_len, SamplingRow())
    step = SchedulerOutput(0, ints(range(num_requests)), ints([prompt_len] * num_requests), requests)
    for _ in range(3):
        runner.execute(step).wait()
    alone = []
    for _ in range(5):
        begun = time.perf_counter()
        runner.execute(step).wait()
        alone.append(time.perf_counter() - begun)
    result = measure_steps(runner, [step] * 6) | profile_steps(runner, [step] * 2)
    return result | {"alone_ms": statistics.median(alone) * 1e3}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--requests", type=int, nargs="*", default=[1, 4, 8, 32, 64, 128, 256])
    options.add_argument("--prompts", type=int, nargs="*", default=[128, 1024, 4096, 16384])
    arguments = options.parse_args()
    config = EngineConfig(
        model=arguments.model,
        load_format="dummy",
        dtype="bfloat16",
        max_num_batched_tokens=16384,
        kv_cache_memory_gb=24,
    )
    phases = Phases("bench", time.time())
    runner, ready = Startup(ConfigureWorker(config, 0, MAX_MODEL_LEN), phases, lambda: None).run()
    results: dict[str, Any] = {"start": {row.phase: row.seconds for row in ready.phases}}
    for count in arguments.requests:
        results[f"decode {count}"] = decode(runner, count, SamplingRow())
        print(f"decode {count}", results[f"decode {count}"], flush=True)
    drawn = SamplingRow(temperature=0.6, seed=1)
    results["decode 256 drawn"] = decode(runner, 256, drawn)
    filtered = SamplingRow(temperature=0.6, top_k=20, top_p=0.95, seed=1)
    for count in (1, 256):
        results[f"decode {count} filtered"] = decode(runner, count, filtered)
    for length in arguments.prompts:
        results[f"prefill 1 x {length}"] = prefill(runner, 1, length)
        print(f"prefill {length}", results[f"prefill 1 x {length}"], flush=True)
    results["prefill 16 x 1024"] = prefill(runner, 16, 1024)
    figures = ["step_ms", "host_ms", "busy_ms", "alone_ms", "first_steps_s"]
    rows = [
        [
            name,
            *(f"{result[key]:.3f}" if key in result else "" for key in figures),
            " ".join(f"{kind} {value:.3f}" for kind, value in sorted(result["kinds_ms"].items())),
        ]
        for name, result in results.items()
        if name != "start"
    ]
    print({key: round(value, 2) for key, value in results["start"].items()})
    print_table(["step", *figures, "kinds, ms"], rows)
    write_json("gpu_steps", {"options": vars(arguments), "card": torch.cuda.get_device_name(), "steps": results})


if __name__ == "__main__":
    main()
