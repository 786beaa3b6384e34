"""Latency of one request alone: time to first token (TTFT), time per output token (TPOT), end to end (E2E).

Run it as

    python -m bench.latency --prompt-len 128 --output-len 128
"""

import itertools
import statistics
import time
from dataclasses import dataclass

from bench import plots
from bench.common import machine, print_table, write_json
from bench.workload import exactly, parser, percentile, random_prompts
from folovllm import LLM


@dataclass(frozen=True)
class Sample:
    """One streamed request: seconds from the call to each token."""

    token_s: list[float]

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.token_s)]

    @property
    def e2e_s(self) -> float:
        return self.token_s[-1]


def measure(llm: LLM, prompt: list[int], output_len: int) -> Sample:
    """Streams one request. Tokens that arrive in one delta have one time."""
    token_s: list[float] = []
    start = time.perf_counter()
    for output in llm.stream(prompt, exactly(output_len)):
        now = time.perf_counter() - start
        token_s += [now for completion in output.outputs for _ in completion.token_ids]
    if len(token_s) != output_len:
        raise RuntimeError(f"asked for {output_len} tokens, got {len(token_s)}")
    return Sample(token_s)


def summary(samples: list[Sample]) -> dict[str, float]:
    """Medians over the samples, in milliseconds and tokens per second; the 99th percentile of all gaps."""
    gaps = [gap for sample in samples for gap in sample.gaps_s]
    e2e = statistics.median(sample.e2e_s for sample in samples)
    return {
        "ttft_ms": statistics.median(sample.ttft_s for sample in samples) * 1e3,
        "tpot_ms": statistics.median(statistics.fmean(sample.gaps_s) for sample in samples) * 1e3,
        "gap_p50_ms": statistics.median(gaps) * 1e3,
        "gap_p99_ms": percentile(gaps, 99) * 1e3,
        "e2e_ms": e2e * 1e3,
        "output_tokens_per_s": len(samples[0].token_s) / e2e,
    }


def plot(samples: list[Sample], name: str, *, quick: bool) -> None:
    """Gaps between tokens over the answer, and their distribution."""
    figure, (over_time, spread) = plots.new_figure(2)
    for number, sample in enumerate(samples):
        over_time.plot([gap * 1e3 for gap in sample.gaps_s], linewidth=0.8, label=f"run {number + 1}")
    over_time.set_ylim(bottom=0)
    over_time.legend(fontsize="small")
    plots.label(over_time, "Gap before each output token", "output token", "ms")
    spread.hist([gap * 1e3 for sample in samples for gap in sample.gaps_s], bins=40)
    plots.label(spread, "All gaps", "ms", "tokens")
    plots.save(figure, name, quick=quick)


def main() -> None:
    options = parser("Latency of one request alone.")
    options.add_argument("--prompt-len", type=int, default=128)
    options.add_argument("--output-len", type=int, default=128)
    arguments = options.parse_args()
    if arguments.output_len < 2:
        options.error("--output-len must be at least 2: a gap needs two tokens")
    if arguments.quick:
        arguments.prompt_len, arguments.output_len, arguments.repeats = 16, 8, 2
    (prompt,) = random_prompts([arguments.prompt_len], arguments.seed)
    with LLM(arguments.model, dtype=arguments.dtype, device=arguments.device) as llm:
        measure(llm, prompt, arguments.output_len)  # warm-up
        samples = [measure(llm, prompt, arguments.output_len) for _ in range(arguments.repeats)]
    figures = summary(samples)
    print(f"one request, {arguments.prompt_len} + {arguments.output_len} tokens, {machine()['processor']}")
    print_table(
        ["TTFT ms", "TPOT ms", "gap p50 ms", "gap p99 ms", "E2E ms", "tokens/s"],
        [[f"{value:.1f}" for value in figures.values()]],
    )
    name = "latency-quick" if arguments.quick else "latency"
    write_json(name, {"options": vars(arguments), "result": figures})
    plot(samples, name, quick=arguments.quick)


if __name__ == "__main__":
    main()
