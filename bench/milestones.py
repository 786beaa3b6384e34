"""The figures of the milestones, measured on the public API; `--only` chooses.

M1  one request: latency, against the least time that reading the weights takes
M2  requests one by one against continuous batching, 1 to 64 of them; at 16 also against transformers' generate
M3  KV memory: contiguous reservation against paged blocks
M5  gaps between the tokens of running requests while a long prompt arrives: unchunked, fixed chunks, a target
M6  reuse of prefixes: time to first token cold and warm, many requests that share one, a conversation
M7  4-bit weights: memory, load, speed and quality against the unquantized model

python -m bench.milestones            all of them (half an hour)
python -m bench.milestones --only M2
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench import kv_memory, latency, plots
from bench.chunked_prefill import m5
from bench.common import machine, print_table, write_json
from bench.hf_baseline import HFBaseline
from bench.prefix_reuse import m6
from bench.quantized import m7
from bench.workload import Lengths, exactly, mixed_lengths, parser, random_prompts
from folovllm import LLM
from folovllm.common.model_config import read_model_config
from folovllm.frontend.model_hub import resolve

BLOCK_SIZE = 16
COMPARED_COUNT = 16  # requests at which the two ratios are taken
BYTES_PER_NUMBER = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """How much each milestone runs; `--quick` takes tiny ones."""

    prompt_len: int
    output_len: int
    counts: tuple[int, ...]
    num_mixed: int
    repeats: int


def sizes(arguments: argparse.Namespace) -> Sizes:
    if arguments.quick:
        return Sizes(prompt_len=16, output_len=8, counts=(1, 2, COMPARED_COUNT), num_mixed=8, repeats=1)
    return Sizes(128, 128, (1, 2, 4, 8, COMPARED_COUNT, 32, 64), 64, arguments.repeats)


def open_llm(arguments: argparse.Namespace) -> LLM:
    return LLM(arguments.model, dtype=arguments.dtype, device=arguments.device, block_size=BLOCK_SIZE)


def m1(arguments: argparse.Namespace, size: Sizes) -> dict[str, Any]:
    """One request: TTFT, TPOT, E2E."""
    (prompt,) = random_prompts([size.prompt_len], arguments.seed)
    with open_llm(arguments) as llm:
        latency.measure(llm, prompt, size.output_len)  # warm-up
        samples = [latency.measure(llm, prompt, size.output_len) for _ in range(size.repeats)]
        weights = sum(use.num_bytes for use in llm.startup.memory if use.purpose == "weights")
    figures = latency.summary(samples)
    figures["weight_bytes"] = weights
    figures["weights_read_gb_per_s"] = weights / figures["tpot_ms"] / 1e6
    print(f"\nM1: one request, {size.prompt_len} + {size.output_len} tokens, {arguments.dtype}")
    print_table(["figure", "value"], [[name, f"{value:.1f}"] for name, value in figures.items()])
    latency.plot(samples, "m1_one_request", quick=arguments.quick)
    return {"sizes": asdict(size), **figures}


def progress(text: str) -> None:
    """A line that is seen at once: the whole takes minutes."""
    print(text, flush=True)


def run_at_once(llm: LLM, prompts: list[list[int]], output_len: int) -> tuple[float, list[list[int]]]:
    """Seconds and ids of one call with all prompts."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, exactly(output_len), use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, [list(output.outputs[0].token_ids) for output in outputs]


def run_one_by_one(llm: LLM, prompts: list[list[int]], output_len: int) -> tuple[float, list[list[int]]]:
    """Seconds and ids of as many calls as there are prompts, one after another."""
    runs = [run_at_once(llm, [prompt], output_len) for prompt in prompts]
    return sum(seconds for seconds, _ in runs), [answer for _, answers in runs for answer in answers]


def m2(arguments: argparse.Namespace, size: Sizes) -> dict[str, Any]:
    """One by one against continuous, and against transformers' generate; all in one run, taken in turns."""
    prompts = random_prompts([size.prompt_len] * max(size.counts), arguments.seed)
    baseline = HFBaseline(arguments.model, arguments.dtype, arguments.device)
    ways: dict[str, list[float]] = {"one_by_one": [], "continuous": [], "transformers": []}
    sweep: dict[int, list[float]] = {count: [] for count in size.counts}
    compared = prompts[:COMPARED_COUNT]
    with open_llm(arguments) as llm:
        run_at_once(llm, compared, 4)  # warm-up
        baseline.generate(compared, 2)
        for turn in range(size.repeats):
            answers = {
                "one_by_one": run_one_by_one(llm, compared, size.output_len),
                "continuous": run_at_once(llm, compared, size.output_len),
                "transformers": baseline.generate(compared, size.output_len),
            }
            for way, (seconds, ids) in answers.items():
                if [len(answer) for answer in ids] != [size.output_len] * len(compared):
                    raise RuntimeError(f"{way}: an answer does not have {size.output_len} tokens")
                ways[way].append(seconds)
            progress(f"M2 turn {turn + 1}: " + ", ".join(f"{way} {ways[way][-1]:.1f} s" for way in ways))
        for turn in range(size.repeats):
            for count in size.counts:
                sweep[count].append(run_at_once(llm, prompts[:count], size.output_len)[0])
            progress(
                f"M2 sweep {turn + 1}: " + ", ".join(f"{count}: {sweep[count][-1]:.1f} s" for count in size.counts)
            )
    return report_m2(arguments, size, ways, sweep)


def report_m2(
    arguments: argparse.Namespace, size: Sizes, ways: dict[str, list[float]], sweep: dict[int, list[float]]
) -> dict[str, Any]:
    """Table, plot and JSON of M2. Ratios are medians of each round's own ratio."""

    def rate(count: int, seconds: list[float]) -> float:
        return count * size.output_len / statistics.median(seconds)

    def ratio(slow: str) -> float:
        return statistics.median(a / b for a, b in zip(ways[slow], ways["continuous"], strict=True))

    rates = {way: rate(COMPARED_COUNT, seconds) for way, seconds in ways.items()}
    continuous = {count: rate(count, seconds) for count, seconds in sweep.items()}
    print(f"\nM2: {size.prompt_len} + {size.output_len} tokens each, {arguments.dtype}; output tokens/s")
    print_table(["requests at once", "tokens/s"], [[count, f"{value:.1f}"] for count, value in continuous.items()])
    rows = [[way, f"{value:.1f}", f"{ratio(way):.2f}"] for way, value in rates.items()]
    print_table([f"{COMPARED_COUNT} requests", "tokens/s", "continuous is faster by"], rows)
    figure, (ax,) = plots.new_figure()
    ax.plot(list(continuous), list(continuous.values()), marker="o", label="continuous batching")
    ax.axhline(rates["one_by_one"], color="gray", linestyle="--", label="one by one")
    ax.plot([COMPARED_COUNT], [rates["transformers"]], marker="s", linestyle="", label="transformers generate")
    ax.set_ylim(bottom=0)
    plots.log2_ticks(ax, list(continuous))
    ax.legend(fontsize="small")
    plots.label(ax, f"{size.prompt_len} + {size.output_len} tokens each", "requests at once", "output tokens/s")
    plots.save(figure, "m2_continuous_batching", quick=arguments.quick)
    return {
        "sizes": asdict(size),
        "tokens_per_s": rates,
        "seconds": ways,
        "continuous_tokens_per_s": continuous,
        "ratio_one_by_one": ratio("one_by_one"),
        "ratio_transformers": ratio("transformers"),
    }


def m3(arguments: argparse.Namespace, size: Sizes) -> dict[str, Any]:
    """Bytes reserved, bytes used and requests that fit, contiguous against paged."""
    folder = resolve(arguments.model)
    if arguments.dtype not in BYTES_PER_NUMBER:
        raise ValueError("M3 counts bytes: name a dtype other than auto")
    max_model_len = read_model_config(folder).default_max_model_len
    lengths = mixed_lengths(size.num_mixed, arguments.seed)
    with open_llm(arguments) as llm:
        every = size.num_mixed  # about once a step
        readings = kv_memory.watch_engine(llm, lengths, block_size=BLOCK_SIZE, seed=arguments.seed, every=every)
    fullest = max(readings, key=lambda reading: (reading.num_running, reading.tokens_used))
    per_token = kv_memory.kv_bytes_per_token(folder, BYTES_PER_NUMBER[arguments.dtype])
    budget_tokens = int(arguments.kv_budget_mib * 2**20) // per_token
    rows: list[tuple[str, int, int]] = [
        ("contiguous", fullest.num_running * max_model_len, kv_memory.fit_contiguous(budget_tokens, max_model_len)),
        ("paged", fullest.tokens_reserved, kv_memory.fit_paged(budget_tokens, BLOCK_SIZE, lengths)),
    ]
    used = fullest.tokens_used
    table = [
        [way, f"{reserved * per_token / 2**20:.1f}", f"{used * per_token / 2**20:.1f}", f"{used / reserved:.1%}", fit]
        for way, reserved, fit in rows
    ]
    print(f"\nM3: {fullest.num_running} mixed requests in work, {per_token} bytes a token, blocks of {BLOCK_SIZE}")
    headers = ["way", "MiB reserved", "MiB used", "used share", f"requests in {arguments.kv_budget_mib} MiB"]
    print_table(headers, table)
    plot_m3(readings, lengths, max_model_len, quick=arguments.quick)
    return {
        "num_requests": size.num_mixed,
        "num_running": fullest.num_running,
        "max_model_len": max_model_len,
        "bytes_per_token": per_token,
        "block_size": BLOCK_SIZE,
        "budget_mib": arguments.kv_budget_mib,
        "bytes_used": used * per_token,
        "bytes_reserved": {way: reserved * per_token for way, reserved, _ in rows},
        "used_share": {way: used / reserved for way, reserved, _ in rows},
        "requests_in_budget": {way: fit for way, _, fit in rows},
        "readings": [asdict(reading) for reading in readings],
    }


def plot_m3(readings: list[kv_memory.Reading], lengths: list[Lengths], max_model_len: int, *, quick: bool) -> None:
    """Tokens held and reserved over the run; the share in use."""
    figure, (tokens, share) = plots.new_figure(2)
    steps = [reading.step for reading in readings]
    tokens.plot(steps, [reading.tokens_reserved for reading in readings], label="reserved in blocks")
    tokens.plot(steps, [reading.tokens_used for reading in readings], label="held")
    tokens.set_ylim(bottom=0)
    tokens.legend(fontsize="small")
    plots.label(tokens, f"{len(lengths)} mixed requests", "step", "tokens in the KV cache")
    share.plot(steps, [100 * reading.tokens_used / reading.tokens_reserved for reading in readings], label="paged")
    contiguous = [100 * reading.tokens_used / (reading.num_running * max_model_len) for reading in readings]
    share.plot(steps, contiguous, label=f"contiguous, {max_model_len} tokens each")
    share.set_ylim(0, 102)
    share.legend(fontsize="small")
    plots.label(share, "Share of the reserved KV bytes that holds tokens", "step", "%")
    plots.save(figure, "m3_kv_memory", quick=quick)


MILESTONES: dict[str, Callable[[argparse.Namespace, Sizes], dict[str, Any]]] = {
    "M1": m1,
    "M2": m2,
    "M3": m3,
    "M5": lambda arguments, _: m5(arguments),
    "M6": lambda arguments, _: m6(arguments),
    "M7": lambda arguments, _: m7(arguments),
}


def main() -> None:
    options = parser("Figures of the milestones.")
    options.set_defaults(repeats=3)
    options.add_argument("--only", nargs="+", choices=sorted(MILESTONES), default=sorted(MILESTONES))
    options.add_argument("--quantized", type=pathlib.Path, help="M7: a folder of folovllm quantize [made and kept]")
    options.add_argument("--kv-budget-mib", type=int, default=1024, help="M3: a fixed budget")
    arguments = options.parse_args()
    print(machine())
    for name in arguments.only:
        result = MILESTONES[name](arguments, sizes(arguments))
        write_json(name.lower() + ("-quick" if arguments.quick else ""), {"result": result})


if __name__ == "__main__":
    main()
