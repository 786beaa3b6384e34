"""M7: a model unquantized and in 4 bits: memory, load time, speed and quality, one table and one plot."""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import plots, quality
from bench.common import print_table
from bench.workload import exactly, random_prompts
from folovllm import LLM
from folovllm.common.config import cache_dir
from folovllm.common.quantize_job import work_folder
from folovllm.frontend.model_hub import resolve

PROMPT_LEN, OUTPUT_LEN = 64, 64
COUNTS = (1, 16, 64)
GROUP_SIZE = 64


def m7(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models by turns in one run, then their quality."""
    folder = resolve(arguments.model)
    small = arguments.quantized or quantized_copy(folder, quick=arguments.quick)
    counts, output_len = (COUNTS, OUTPUT_LEN) if not arguments.quick else ((1, 2), 4)
    speeds: dict[str, dict[int, list[float]]] = {}
    memory: dict[str, dict[str, float]] = {}
    for _ in range(arguments.repeats):
        for name, path in (("unquantized", folder), ("quantized", small)):
            memory[name] = _run(path, arguments, counts, output_len, speeds.setdefault(name, {}))
    found = quality.measure(folder, small, 4 if arguments.quick else 16)
    result = {
        "prompt_len": PROMPT_LEN,
        "output_len": output_len,
        "memory": memory,
        "tokens_per_s": {
            name: {count: statistics.median(rates) for count, rates in each.items()} for name, each in speeds.items()
        },
        **found,
    }
    show(result)
    plot(result, quick=arguments.quick)
    return result


def quantized_copy(folder: pathlib.Path, *, quick: bool) -> pathlib.Path:
    """`folovllm quantize`, symmetric, once; kept in the cache."""
    out = cache_dir() / "bench" / f"{folder.name}-4bit-{GROUP_SIZE}{'-quick' if quick else ''}"
    if not (out / "config.json").is_file() or work_folder(out).exists():  # unfinished: it is taken up again
        more = ["--num-samples", "4" if quick else "64", "--quantizer", "own"]
        command = [sys.executable, "-m", "folovllm", "quantize", str(folder), str(out), "--group-size", str(GROUP_SIZE)]
        subprocess.run([*command, *more], check=True)
    return out


def _run(
    path: pathlib.Path,
    arguments: argparse.Namespace,
    counts: tuple[int, ...],
    output_len: int,
    rates: dict[int, list[float]],
) -> dict[str, float]:
    """Adds tokens/s at each number of requests to `rates`; returns figures of memory and load."""
    prompts = random_prompts([PROMPT_LEN] * max(counts), arguments.seed)
    options = {"dtype": "bfloat16", "device": arguments.device, "enable_prefix_caching": False}
    with LLM(str(path), **options) as llm:
        for count in counts:  # warm-up: kernels are compiled, memory is touched
            llm.generate(prompts[:count], exactly(4), use_tqdm=False)
        resident = _resident_of_worker()
        for count in counts:
            start = time.perf_counter()
            llm.generate(prompts[:count], exactly(output_len), use_tqdm=False)
            rates.setdefault(count, []).append(count * output_len / (time.perf_counter() - start))
        weights = next(use.num_bytes for use in llm.startup.memory if use.purpose == "weights")
        phases = {phase.phase: phase.seconds for phase in llm.startup.phases}
    loading = sum(seconds for name, seconds in phases.items() if "weights" in name)
    return {"weight_bytes": weights, "worker_resident_bytes": resident, "load_s": loading}


def _resident_of_worker() -> int:
    """Bytes of memory that the worker process holds."""
    import psutil

    for process in psutil.Process(os.getpid()).children(recursive=True):
        if any("folovllm.worker_proc" in word for word in process.cmdline()):
            return int(process.memory_info().rss)
    raise RuntimeError("no worker process found")


def show(result: dict[str, Any]) -> None:
    """The table: memory and speed, then quality."""
    names = list(result["memory"])
    rows: list[list[object]] = []
    for key, unit, factor in (
        ("weight_bytes", "weights, MB", 1e6),
        ("worker_resident_bytes", "worker process, MB", 1e6),
        ("load_s", "load, s", 1.0),
    ):
        values = [result["memory"][name][key] / factor for name in names]
        rows.append([unit, *(f"{value:.2f}" for value in values), f"{values[1] / values[0]:.2f}"])
    for count in result["tokens_per_s"][names[0]]:
        rates = [result["tokens_per_s"][name][count] for name in names]
        rows.append([f"tokens/s, {count} requests", *(f"{rate:.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f}"])
    print_table(["", *names, "ratio"], rows)
    quality.show(result)


def plot(result: dict[str, Any], *, quick: bool) -> None:
    """Speed by number of requests; perplexity."""
    figure, (speed, perplexity) = plots.new_figure(2)
    for name, rates in result["tokens_per_s"].items():
        speed.plot(list(rates), list(rates.values()), marker="o", label=name)
    plots.log2_ticks(speed, list(result["tokens_per_s"]["quantized"]))
    speed.set_ylim(bottom=0)
    speed.legend(fontsize="small")
    plots.label(speed, f"{PROMPT_LEN} + {result['output_len']} tokens each", "requests at once", "output tokens/s")
    values = {name: each["perplexity"] for name, each in result["quality"].items()}
    perplexity.bar(list(values), list(values.values()), color=["C0", "C1", "0.7"])
    plots.label(perplexity, f"{result['tokens']} tokens of Python's documentation", "", "perplexity")
    plots.save(figure, "m7_gptq", quick=quick)
