"""Throughput of many requests at once, for several numbers of them.

Run it as

    python -m bench.throughput --num-requests 1 4 16 64 --prompt-len 128 --output-len 128
    python -m bench.throughput --num-requests 64 --mixed
"""

import statistics
import time
from dataclasses import asdict, dataclass

from bench import plots
from bench.common import machine, print_table, write_json
from bench.workload import Lengths, exactly, mixed_lengths, parser, percentile, random_prompts
from folovllm import LLM
from folovllm.frontend.outputs import RequestOutput


@dataclass(frozen=True)
class Point:
    """Figures for one number of requests (medians over the repeats).

    Attributes:
        num_requests: put at once, in one call.
        requests_per_s, prompt_tokens_per_s, output_tokens_per_s: over the whole call.
        ttft_p50_ms, ttft_p99_ms: time to first token over the requests.
        tpot_p50_ms: time per output token over the requests.
        seconds: of the whole call.
    """

    num_requests: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    seconds: float


def run_once(llm: LLM, lengths: list[Lengths], seed: int) -> tuple[float, list[RequestOutput]]:
    """Seconds and outputs of one call with all requests; checks that each has the tokens it was asked for."""
    prompts = random_prompts([length.prompt for length in lengths], seed)
    params = [exactly(length.output) for length in lengths]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if got != [length.output for length in lengths]:
        raise RuntimeError("an answer has another length than it was asked for")
    return seconds, outputs


def measure(llm: LLM, lengths: list[Lengths], seed: int, repeats: int) -> Point:
    """The median call of `repeats` equal ones."""
    runs = sorted((run_once(llm, lengths, seed) for _ in range(repeats)), key=lambda run: run[0])
    seconds, outputs = runs[len(runs) // 2]
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    ttft = [value for each in metrics if (value := each.time_to_first_token) is not None]
    tpot = [value for each in metrics if (value := each.time_per_output_token) is not None]
    return Point(
        num_requests=len(lengths),
        requests_per_s=len(lengths) / seconds,
        prompt_tokens_per_s=sum(length.prompt for length in lengths) / seconds,
        output_tokens_per_s=sum(length.output for length in lengths) / seconds,
        ttft_p50_ms=statistics.median(ttft) * 1e3,
        ttft_p99_ms=percentile(ttft, 99) * 1e3,
        tpot_p50_ms=statistics.median(tpot) * 1e3,
        seconds=seconds,
    )


def shown(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def plot(points: list[Point], name: str, *, quick: bool) -> None:
    """Throughput and latency over the number of requests."""
    figure, (rate, latency) = plots.new_figure(2)
    counts = [point.num_requests for point in points]
    rate.plot(counts, [point.output_tokens_per_s for point in points], marker="o")
    rate.set_ylim(bottom=0)
    plots.label(rate, "Throughput", "requests at once", "output tokens/s")
    latency.plot(counts, [point.ttft_p50_ms for point in points], marker="o", label="TTFT, median")
    latency.plot(counts, [point.tpot_p50_ms for point in points], marker="s", label="TPOT, median")
    latency.set_yscale("log")
    latency.legend(fontsize="small")
    plots.label(latency, "Latency of each request", "requests at once", "ms")
    for ax in (rate, latency):
        plots.log2_ticks(ax, counts)
    plots.save(figure, name, quick=quick)


def main() -> None:
    options = parser("Throughput of many requests at once.")
    options.add_argument("--num-requests", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--prompt-len", type=int, default=128)
    options.add_argument("--output-len", type=int, default=128)
    options.add_argument("--mixed", action="store_true", help="mixed lengths instead of the two above")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.num_requests, arguments.prompt_len, arguments.output_len, arguments.repeats = [1, 4], 16, 8, 1
    points = []
    with LLM(arguments.model, dtype=arguments.dtype, device=arguments.device) as llm:
        run_once(llm, [Lengths(arguments.prompt_len, 4)], arguments.seed)  # warm-up
        for count in arguments.num_requests:
            fixed = [Lengths(arguments.prompt_len, arguments.output_len)] * count
            lengths = mixed_lengths(count, arguments.seed) if arguments.mixed else fixed
            points.append(measure(llm, lengths, arguments.seed, arguments.repeats))
    kind = "mixed lengths" if arguments.mixed else f"{arguments.prompt_len} + {arguments.output_len} tokens each"
    print(f"{kind}, {machine()['processor']}")
    print_table(
        ["requests", "req/s", "prompt tok/s", "output tok/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "seconds"],
        [[shown(value) for value in asdict(point).values()] for point in points],
    )
    name = "throughput" + ("-mixed" if arguments.mixed else "") + ("-quick" if arguments.quick else "")
    write_json(name, {"options": vars(arguments), "points": [asdict(point) for point in points]})
    plot(points, name, quick=arguments.quick)


if __name__ == "__main__":
    main()
