"""Everything that is measured on one GPU, in one call: the card's limits, then workloads W1 to W4b.

    python -m bench.make_model FOLDER && python -m bench.gpu --model FOLDER

The model's weights are random; prompts are random token ids; answers have exactly the length asked for. Every workload
runs once to warm up (kernels are compiled and steps captured then), then `--repeats` times; medians are reported.

* W1: 256 requests, prompts and answers of 100 to 1,024 tokens (drawn as nano-vllm's benchmark does, seed 0),
  temperature 0.6: output tokens/s over the whole call.
* W2: 1 request, 128 + 512 tokens, greedy: ms per output token after the first.
* W3: 32 and 256 requests, 128 + 256 tokens, greedy: ms per step after all have their first token.
* W4: one prompt of 1,024, 4,096 and 16,384 tokens: ms until its first token.
* W4b: 64 prompts of 1,024 tokens, one token each: prompt tokens/s.
"""

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from bench.common import print_table, write_json
from bench.workload import random_prompts
from folovllm import LLM, SamplingParams

W1, W2, W3, W4, W4B = "W1", "W2", "W3", "W4", "W4b"
GIB = 2**30


def card_limits() -> dict[str, Any]:
    """Bytes per second of a large read, and operations per second of a large bf16 product."""
    import torch  # the frontend needs none

    limits = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_TB_per_s": 4 * GIB / device_seconds(torch.ones(GIB // 2, dtype=torch.int64, device="cuda").max) / 1e12,
        "bf16_TFLOP_per_s": 2 * 8192**3 / product_seconds(8192) / 1e12,
    }
    torch.cuda.empty_cache()
    return limits


def product_seconds(size: int) -> float:
    """Of two square bf16 matrices."""
    import torch

    left = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    return device_seconds(functools.partial(torch.mm, left, left))


def device_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median of the seconds that the device takes."""
    import torch

    seconds = []
    for turn in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 3:
            seconds.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(seconds)


def generate(llm: LLM, prompt_lens: list[int], output_lens: list[int], seed: int, temperature: float = 0.0) -> Any:
    """Seconds of one call, and its outputs; checks that each answer has its length."""
    prompts = random_prompts(prompt_lens, seed)
    params = [SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True) for length in output_lens]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    if [len(output.outputs[0].token_ids) for output in outputs] != output_lens:
        raise RuntimeError("an answer has another length than it was asked for")
    return seconds, outputs


def w1(llm: LLM, seed: int) -> dict[str, float]:
    """Output tokens/s of a mixed load; the lengths are the same in every repeat."""
    generator = random.Random(0)
    prompt_lens = [generator.randint(100, 1024) for _ in range(256)]
    output_lens = [generator.randint(100, 1024) for _ in range(256)]
    seconds, _ = generate(llm, prompt_lens, output_lens, seed, temperature=0.6)
    return {"output tokens/s": sum(output_lens) / seconds}


def decode(llm: LLM, num_requests: int, num_tokens: int, seed: int) -> dict[str, float]:
    """ms per step once all requests decode: from the last first token to the last token."""
    seconds, outputs = generate(llm, [128] * num_requests, [num_tokens] * num_requests, seed)
    first = max(output.metrics.time_to_first_token for output in outputs)
    return {
        "ms per step": (seconds - first) / (num_tokens - 1) * 1e3,
        "output tokens/s": num_requests * num_tokens / seconds,
    }


def first_token(llm: LLM, prompt_len: int, seed: int) -> dict[str, float]:
    """ms until the first token of one prompt, as its caller sees it."""
    return {"ms": generate(llm, [prompt_len], [1], seed)[0] * 1e3}


def prefill(llm: LLM, seed: int) -> dict[str, float]:
    """Prompt tokens/s of many prompts at once."""
    return {"prompt tokens/s": 64 * 1024 / generate(llm, [1024] * 64, [1] * 64, seed)[0]}


def workloads(wanted: Iterable[str]) -> dict[str, Callable[[LLM, int], dict[str, float]]]:
    """Name → one run of it with a seed."""
    known: dict[str, Callable[[LLM, int], dict[str, float]]] = {
        f"{W2} 1 request": lambda llm, seed: decode(llm, 1, 512, seed),
        f"{W3} 32 requests": lambda llm, seed: decode(llm, 32, 256, seed),
        f"{W3} 256 requests": lambda llm, seed: decode(llm, 256, 256, seed),
        f"{W4} 1,024 tokens": lambda llm, seed: first_token(llm, 1024, seed),
        f"{W4} 4,096 tokens": lambda llm, seed: first_token(llm, 4096, seed),
        f"{W4} 16,384 tokens": lambda llm, seed: first_token(llm, 16384, seed),
        f"{W4B} 64 x 1,024": prefill,
        f"{W1} mixed": w1,
    }
    return {name: run for name, run in known.items() if name.split()[0] in wanted}


def measure(llm: LLM, run: Callable[[LLM, int], dict[str, float]], repeats: int) -> dict[str, Any]:
    """Medians of `repeats` runs after one that warms up; each with prompts of its own, so that no prefix is found."""
    cold = run(llm, 1000)
    runs = [run(llm, seed) for seed in range(1, repeats + 1)]
    medians = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    return {"median": medians, "first": cold, "runs": runs}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder with Qwen3-0.6B's config.json, see bench.make_model")
    options.add_argument("--workloads", nargs="+", default=[W1, W2, W3, W4, W4B], choices=[W1, W2, W3, W4, W4B])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--max-num-batched-tokens", type=int, default=16384)
    arguments = options.parse_args()
    limits = card_limits()
    print(", ".join(f"{key} {value if isinstance(value, str) else round(value, 2)}" for key, value in limits.items()))
    start = time.perf_counter()
    results: dict[str, Any] = {}
    with LLM(
        arguments.model,
        load_format="dummy",
        device="cuda",
        dtype="bfloat16",
        max_model_len=20000,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        gpu_memory_utilization=0.85,
    ) as llm:
        generate(llm, [16], [1], 0)
        started = time.perf_counter() - start
        for name, run in workloads(arguments.workloads).items():
            results[name] = measure(llm, run, arguments.repeats)
            print(name, {key: round(value, 3) for key, value in results[name]["median"].items()}, flush=True)
    print(f"start to first token {started:.1f} s")
    rows = [
        [name, figure, round(value, 3), round(result["first"][figure], 3)]
        for name, result in results.items()
        for figure, value in result["median"].items()
    ]
    print_table(["workload", "figure", "median", "first run"], rows)
    write_json("gpu", {"options": vars(arguments), "limits": limits, "start_s": started, "workloads": results})


if __name__ == "__main__":
    main()
