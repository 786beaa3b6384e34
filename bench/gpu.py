"""Everything that is measured on one GPU, in one call: the card's limits, then all workloads.

    python -m bench.make_model FOLDER --weights && python -m bench.gpu --model FOLDER
    python -m bench.make_model TINY --tiny && python -m bench.gpu --model TINY --device cpu --quick

The second line measures nothing: it shows on any machine that all of it runs. The model's weights are random, read from
the folder if it has any; prompts are random token ids; answers have exactly the length asked for. Every workload runs
once to warm up (kernels are compiled and steps captured then), then `--repeats` times; medians are reported.

* W1: 256 requests, prompts and answers of 100 to 1,024 tokens (drawn as nano-vllm's benchmark does, seed 0),
  temperature 0.6: output tokens/s over the whole call.
* W2: 1 request, 128 + 512 tokens, greedy: ms per output token after the first.
* W3: 32 and 256 requests, 128 + 256 tokens, greedy: ms per step after all have their first token.
* W4: one prompt of 1,024, 4,096 and 16,384 tokens: ms until its first token.
* W4b: 64 prompts of 1,024 tokens, one token each: prompt tokens/s.
* prefix: the first token of a prompt of 4,096 tokens, and of one that shares all of them but the last 16: ms.
* fp8: W1, W2 and W3 again with an FP8 KV cache, and what it does to the logits (`bench.kv_quality`).
* flash_attn: W1, W2, W3 and W4 with the package flash-attn in place of Triton's kernels, where it is installed.
* q4: steps of 1 to 256 requests (128 + 256 tokens), 64 prompts of 1,024 tokens, layer weights and their load, of the
  model in bf16 and of a copy in 4 bits, beside the goals of milestone 7 (`bench.four_bits`).
* server: streams over HTTP through `folovllm serve`, 512 + 128 tokens, 1, 32 and 256 at once: output tokens/s.
* start: from `LLM(...)` to its first token, of the engine that the workloads above run on: s.
"""

import argparse
import functools
import pathlib
import random
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import four_bits
from bench.common import print_table, write_json
from bench.server_streams import run_streams, started
from bench.workload import random_prompts
from folovllm import LLM, SamplingParams
from folovllm.frontend.engine_options import EngineOptions

W1, W2, W3, W4, W4B = "W1", "W2", "W3", "W4", "W4b"
PREFIX, FP8, FLASH, Q4, SERVER = "prefix", "fp8", "flash_attn", "q4", "server"
ALL = (W1, W2, W3, W4, W4B, PREFIX, FP8, FLASH, Q4, SERVER)
GIB = 2**30
_EFFECT_SEQUENCES = 8
_FLASH_BLOCK_SIZE = 256  # that FlashAttention 2 can read

Figures = dict[str, float]
Workload = Callable[[LLM, int], Figures]


@dataclass(frozen=True)
class Sizes:
    """How much is run, in tokens unless said otherwise; `--quick` takes tiny ones."""

    w1_requests: int = 256
    w1_longest: int = 1024
    decode_prompt: int = 128
    w2_output: int = 512
    w3_output: int = 256
    w3_requests: tuple[int, ...] = (32, 256)
    w4_prompts: tuple[int, ...] = (1024, 4096, 16384)
    w4b_requests: int = 64
    w4b_prompt: int = 1024
    prefix: int = 4096
    server_prompt: int = 512
    server_output: int = 128
    server_streams: tuple[int, ...] = (1, 32, 256)
    q4_requests: tuple[int, ...] = tuple(four_bits.GOALS_MS)
    max_model_len: int = 20000


QUICK = Sizes(4, 120, 8, 4, 4, (2, 3), (32, 64), 2, 16, 64, 16, 4, (1, 2), (1, 3), 256)


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


def generate(llm: LLM, prompts: list[list[int]], output_lens: list[int], temperature: float = 0.0) -> tuple[float, Any]:
    """Seconds of one call, and its outputs; checks that each answer has its length."""
    params = [SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True) for length in output_lens]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    if [len(output.outputs[0].token_ids) for output in outputs] != output_lens:
        raise RuntimeError("an answer has another length than it was asked for")
    return seconds, outputs


def w1(sizes: Sizes, llm: LLM, seed: int) -> Figures:
    """Output tokens/s of a mixed load; the lengths are the same in every repeat."""
    generator = random.Random(0)
    prompt_lens, output_lens = (
        [generator.randint(100, sizes.w1_longest) for _ in range(sizes.w1_requests)] for _ in range(2)
    )
    seconds, _ = generate(llm, random_prompts(prompt_lens, seed), output_lens, temperature=0.6)
    return {"output tokens/s": sum(output_lens) / seconds}


def decode(prompt_len: int, num_requests: int, num_tokens: int, llm: LLM, seed: int) -> Figures:
    """ms per step once all requests decode: from the last first token to the last token."""
    prompts = random_prompts([prompt_len] * num_requests, seed)
    seconds, outputs = generate(llm, prompts, [num_tokens] * num_requests)
    first = max(output.metrics.time_to_first_token for output in outputs)
    return {
        "ms per step": (seconds - first) / (num_tokens - 1) * 1e3,
        "output tokens/s": num_requests * num_tokens / seconds,
    }


def first_token(prompt_len: int, llm: LLM, seed: int) -> Figures:
    """ms until the first token of one prompt, as its caller sees it."""
    return {"ms": generate(llm, random_prompts([prompt_len], seed), [1])[0] * 1e3}


def prefill(num_requests: int, prompt_len: int, llm: LLM, seed: int) -> Figures:
    """Prompt tokens/s of many prompts at once."""
    prompts = random_prompts([prompt_len] * num_requests, seed)
    return {"prompt tokens/s": num_requests * prompt_len / generate(llm, prompts, [1] * num_requests)[0]}


def prefix(length: int, llm: LLM, seed: int) -> Figures:
    """ms until the first token of a prompt, and of one that differs in its last 16 tokens alone."""
    shared, own, other = random_prompts([length - 16, 16, 16], seed)
    cold, _ = generate(llm, [shared + own], [1])
    warm, outputs = generate(llm, [shared + other], [1])
    if not outputs[0].num_cached_tokens:
        raise RuntimeError("the prefix was not found")
    return {"cold, ms": cold * 1e3, "hit, ms": warm * 1e3, "hit / cold": warm / cold}


def workloads(sizes: Sizes, wanted: Sequence[str] = ALL) -> dict[str, Workload]:
    """Name → one run of it with a seed; a name's first word says what it belongs to."""
    known: dict[str, Workload] = {f"{W2} 1 request": functools.partial(decode, sizes.decode_prompt, 1, sizes.w2_output)}
    for count in sizes.w3_requests:
        known[f"{W3} {count} requests"] = functools.partial(decode, sizes.decode_prompt, count, sizes.w3_output)
    for length in sizes.w4_prompts:
        known[f"{W4} {length:,} tokens"] = functools.partial(first_token, length)
    known[f"{W4B} {sizes.w4b_requests} x {sizes.w4b_prompt:,}"] = functools.partial(
        prefill, sizes.w4b_requests, sizes.w4b_prompt
    )
    known[f"{PREFIX} {sizes.prefix:,} tokens"] = functools.partial(prefix, sizes.prefix)
    known[f"{W1} mixed"] = functools.partial(w1, sizes)
    return {name: run for name, run in known.items() if name.split()[0] in wanted}


def measure(name: str, run: Callable[[int], Figures], repeats: int) -> dict[str, Any]:
    """Medians of `repeats` runs after one that warms up.

    Each run has prompts of its own: with seeds that workloads share, a prompt of one would begin as one of another did,
    and be found in the prefix cache.
    """
    seed = zlib.crc32(name.encode())
    cold, *runs = [run(seed + turn) for turn in range(repeats + 1)]
    medians = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    return {"median": medians, "first": cold, "runs": runs}


class Bench:
    """One call's options, and its results by name."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = pathlib.Path(arguments.model)
        self.sizes = QUICK if arguments.quick else Sizes()
        self.repeats = 1 if arguments.quick else arguments.repeats
        self.results: dict[str, dict[str, Any]] = {}
        self._arguments = arguments

    @property
    def has_weights(self) -> bool:
        return (self.folder / "model.safetensors").exists()

    def options(self) -> EngineOptions:
        """Of every engine."""
        return {
            "load_format": "auto" if self.has_weights else "dummy",
            "device": self._arguments.device,
            "dtype": "bfloat16",
            "max_model_len": self.sizes.max_model_len,
            "max_num_batched_tokens": self._arguments.max_num_batched_tokens,
            "gpu_memory_utilization": 0.85 if self._arguments.device == "cuda" else 0.3,
        }

    def note(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        print(name, {key: round(value, 3) for key, value in result["median"].items()}, flush=True)

    def measure(self, name: str, run: Callable[[int], Figures]) -> dict[str, Any]:
        """Measures and notes one workload."""
        result = measure(name, run, self.repeats)
        self.note(name, result)
        return result

    def run(self, wanted: Mapping[str, Workload], label: str = "", changed: EngineOptions | None = None) -> float:
        """The workloads on one engine; gives the seconds from its start to its first token."""
        options = self.options() | (changed or {})
        start = time.perf_counter()
        with LLM(str(self.folder), **options) as llm:
            generate(llm, random_prompts([16], 0), [1])
            seconds = time.perf_counter() - start
            for name, run in wanted.items():
                self.measure(f"{label}{name}", functools.partial(run, llm))
        return seconds

    def run_flash_attn(self, wanted: Mapping[str, Workload]) -> None:
        """The workloads with the other backend, if it can serve here."""
        import torch

        from folovllm.common.model_config import read_model_config
        from folovllm.worker_proc.attention.flash_attn import what_is_missing
        from folovllm.worker_proc.device import choose_device, place

        placement = place(choose_device(self._arguments.device), torch.bfloat16)
        _, missing = what_is_missing(placement, _FLASH_BLOCK_SIZE, read_model_config(self.folder).head_dim)
        if missing:
            print(f"{FLASH}: not run, it needs {', and '.join(missing)}")
        else:
            self.run(wanted, f"{FLASH} ", {"attention_backend": "flash_attn", "block_size": _FLASH_BLOCK_SIZE})

    def run_four_bits(self, folder: pathlib.Path, label: str) -> four_bits.Measured:
        """What is compared, of the model in `folder`."""
        size = self.sizes
        wanted: dict[str, Workload] = {
            f"{Q4} {label} {count} requests": functools.partial(decode, size.decode_prompt, count, size.w3_output)
            for count in size.q4_requests
        }
        with LLM(str(folder), **self.options()) as llm:
            for name, run in wanted.items():
                self.measure(name, functools.partial(run, llm))
            prompts = self.measure(
                f"{Q4} {label} prompts", functools.partial(prefill, size.w4b_requests, size.w4b_prompt, llm)
            )
            load_s = sum(each.seconds for each in llm.startup.phases if "weights" in each.phase)
        step_ms = [self.results[name]["median"]["ms per step"] for name in wanted]
        steps = dict(zip(size.q4_requests, step_ms, strict=True))
        return four_bits.Measured(steps, prompts["median"]["prompt tokens/s"], load_s)

    def serve(self) -> None:
        """Streams through a server of its own, which has an engine of its own."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in self.options().items()]
        size = self.sizes
        with started("serve", str(self.folder), "--port", "0", "--no-access-log", *given) as ready:
            port = int(ready.split("/v1")[0].rsplit(":", 1)[1])

            def streams(count: int, seed: int) -> Figures:
                prompts = random_prompts([size.server_prompt] * count, seed)
                seconds, _ = run_streams(port, prompts, size.server_output)
                return {"output tokens/s": count * size.server_output / seconds}

            for count in size.server_streams:
                self.measure(f"{SERVER} {count} streams", functools.partial(streams, count))

    def fp8_effect(self) -> None:
        """What FP8 does to the logits, in this process: the engines are not running."""
        import torch

        from bench.kv_quality import SAMPLE_TOKENS, effect_on_logits, load
        from folovllm.worker_proc.device import choose_device, place

        placement = place(choose_device(self._arguments.device), torch.bfloat16)
        count, length = (1, 32) if self._arguments.quick else (_EFFECT_SEQUENCES, SAMPLE_TOKENS)
        sequences = torch.tensor(random_prompts([length] * count, 7))
        model, config = load(self.folder, placement, dummy=not self.has_weights)
        figures = effect_on_logits(model, config, placement, sequences)
        self.note(f"{FP8} effect on logits", {"median": figures, "first": figures})
        del model
        torch.cuda.empty_cache()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder with Qwen3-0.6B's config.json, see bench.make_model")
    options.add_argument("--workloads", nargs="+", default=ALL, choices=ALL)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--max-num-batched-tokens", type=int, default=16384)
    options.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    arguments = options.parse_args()
    limits = card_limits() if arguments.device == "cuda" else {"card": "none, this is a CPU"}
    print(", ".join(f"{key} {value if isinstance(value, str) else round(value, 2)}" for key, value in limits.items()))
    bench, asked = Bench(arguments), arguments.workloads
    started_s = bench.run(workloads(bench.sizes, asked))
    print(f"start to first token {started_s:.1f} s")
    if FP8 in asked:
        bench.run(workloads(bench.sizes, [W1, W2, W3]), f"{FP8} ", {"kv_cache_dtype": "fp8"})
        bench.fp8_effect()
    if FLASH in asked:
        bench.run_flash_attn(workloads(bench.sizes, [W1, W2, W3, W4]))
    beside_goals: list[list[object]] = []
    if Q4 in asked:
        beside_goals = four_bits.measure_both(bench.folder, arguments.device, bench.run_four_bits)
        print_table(["4-bit weights", "bf16", "4 bits", "goal (H100)"], beside_goals)
    if SERVER in asked:
        bench.serve()
    rows = [
        [name, figure, round(value, 3), round(result["first"][figure], 3)]
        for name, result in bench.results.items()
        for figure, value in result["median"].items()
    ]
    print_table(["workload", "figure", "median", "first run"], [*rows, ["start", "s", round(started_s, 1), ""]])
    write_json(
        "gpu" + ("-quick" if arguments.quick else ""),
        {"options": vars(arguments), "limits": limits, "start_s": started_s, "workloads": bench.results}
        | ({"four_bits": beside_goals} if beside_goals else {}),
    )


if __name__ == "__main__":
    main()
