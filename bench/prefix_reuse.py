"""What reuse of prefixes saves, and what it costs where there is nothing to save (M6).

Two engines, one with the prefix cache and one without, take turns in one run. Run it through

    python -m bench.milestones --only M6
"""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench import plots
from bench.common import print_table
from bench.workload import exactly, random_prompts
from folovllm import LLM


@dataclass(frozen=True)
class Sizes:
    """How much is run; `--quick` takes tiny ones."""

    prefix: int = 1000
    own: int = 24
    output: int = 16
    num_sharing: int = 64
    num_turns: int = 6
    turn: int = 40


class Pair:
    """The two engines."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        options = {"dtype": arguments.dtype, "device": arguments.device}
        self.cached = LLM(arguments.model, **options)
        cores = psutil.Process().children()
        self.plain = LLM(arguments.model, enable_prefix_caching=False, **options)
        (second,) = (child for child in psutil.Process().children() if child not in cores)
        self.core = {"cached": cores[0], "plain": second}
        self._seed = arguments.seed

    def prompts(self, *lengths: int) -> list[list[int]]:
        """Prompts that no engine has seen."""
        self._seed += 1
        return random_prompts(lengths, self._seed)

    def close(self) -> None:
        self.cached.close()
        self.plain.close()


def ttft(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the only token, and prompt tokens that were found."""
    start = time.perf_counter()
    (output,) = llm.generate([prompt], exactly(1), use_tqdm=False)
    return time.perf_counter() - start, output.num_cached_tokens or 0


def shared_prefix(pair: Pair, size: Sizes, repeats: int) -> dict[str, Any]:
    """One request at a time: the first with a prefix, then others with the same."""
    cold, warm, found = [], [], 0
    for _ in range(repeats):
        prefix, *own = pair.prompts(size.prefix, *[size.own] * 4)
        cold.append(ttft(pair.cached, prefix + own[0])[0])
        for each in own[1:]:
            seconds, found = ttft(pair.cached, prefix + each)
            warm.append(seconds)
    return {
        "cold_ms": statistics.median(cold) * 1e3,
        "warm_ms": statistics.median(warm) * 1e3,
        "ratio": statistics.median(warm) / statistics.median(cold),
        "found_tokens": found,
        "prompt_tokens": size.prefix + size.own,
    }


def many_sharing(pair: Pair, size: Sizes, repeats: int) -> dict[str, Any]:
    """All at once, none of them seen before: seconds with and without the cache, and the hit rate."""
    seconds: dict[str, list[float]] = {"cached": [], "plain": []}
    rate = 0.0
    for _ in range(repeats):
        prefix, *own = pair.prompts(size.prefix, *[size.own] * size.num_sharing)
        prompts = [prefix + each for each in own]
        for name, llm in (("cached", pair.cached), ("plain", pair.plain)):
            start = time.perf_counter()
            outputs = llm.generate(prompts, exactly(size.output), use_tqdm=False)
            seconds[name].append(time.perf_counter() - start)
            if name == "cached":
                rate = sum(output.num_cached_tokens or 0 for output in outputs) / sum(map(len, prompts))
    ratios = [plain / cached for plain, cached in zip(seconds["plain"], seconds["cached"], strict=True)]
    return {"seconds": seconds, "faster": statistics.median(ratios), "hit_rate": rate}


def multi_turn(pair: Pair, size: Sizes) -> list[dict[str, float]]:
    """A conversation: each turn's prompt is all that was said before and something new."""
    history: list[int] = list(pair.prompts(size.prefix // 4)[0])
    rows = []
    for turn in range(size.num_turns):
        history = history + pair.prompts(size.turn)[0]
        seconds, found = ttft(pair.cached, history)
        without, _ = ttft(pair.plain, history)
        (output,) = pair.cached.generate([history], exactly(size.turn), use_tqdm=False)
        rows.append(
            {
                "turn": turn + 1,
                "prompt_tokens": len(history),
                "found_tokens": found,
                "ttft_ms": seconds * 1e3,
                "ttft_without_ms": without * 1e3,
            }
        )
        history = history + list(output.outputs[0].token_ids)
    return rows


def nothing_shared(pair: Pair, size: Sizes, repeats: int) -> dict[str, Any]:
    """Prompts that have nothing in common: what hashing and looking up cost.

    All of it is work of the core's, a few milliseconds in seconds of the worker's, which vary by more from round to
    round. So the cost is what the core's process computes longer with the cache than without, as if all of it delayed
    the worker, over the time without; the ratio of the times stands beside it.
    """
    seconds: dict[str, list[float]] = {"cached": [], "plain": []}
    core = dict.fromkeys(seconds, 0.0)
    for turn in range(4 * repeats):
        prompts = pair.prompts(*[size.prefix // 4] * (size.num_sharing // 2))
        order = [("cached", pair.cached), ("plain", pair.plain)]
        for name, llm in order if turn % 2 else reversed(order):
            before, start = core_cpu_s(pair.core[name]), time.perf_counter()
            llm.generate(prompts, exactly(size.output), use_tqdm=False)
            seconds[name].append(time.perf_counter() - start)
            core[name] += core_cpu_s(pair.core[name]) - before
    ratios = [cached / plain for cached, plain in zip(seconds["cached"], seconds["plain"], strict=True)]
    cost = (core["cached"] - core["plain"]) / sum(seconds["plain"])
    return {"seconds": seconds, "core_cpu_s": core, "cost": cost, "time_ratio": statistics.median(ratios)}


def core_cpu_s(core: psutil.Process) -> float:
    """Seconds that a process has computed, in steps of the kernel's ticks (10 ms)."""
    times = core.cpu_times()
    return times.user + times.system


def m6(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reuse of prefixes."""
    size = Sizes(prefix=64, own=8, output=4, num_sharing=4, num_turns=3, turn=16) if arguments.quick else Sizes()
    pair = Pair(arguments)
    try:
        for llm in (pair.cached, pair.plain):
            ttft(llm, pair.prompts(size.prefix)[0])  # warm-up
        system = shared_prefix(pair, size, arguments.repeats)
        print(f"M6 shared prefix: {system}", flush=True)
        many = many_sharing(pair, size, arguments.repeats)
        print(f"M6 {size.num_sharing} at once: {many['faster']:.2f} times faster", flush=True)
        turns = multi_turn(pair, size)
        nothing = nothing_shared(pair, size, arguments.repeats)
    finally:
        pair.close()
    print(f"\nM6: {size.prefix} shared tokens + {size.own} of one's own, {arguments.dtype}")
    print_table(
        ["figure", "value"],
        [
            ["time to first token, cold", f"{system['cold_ms']:.0f} ms"],
            ["time to first token, warm", f"{system['warm_ms']:.0f} ms ({system['ratio']:.3f} of cold)"],
            [f"{size.num_sharing} requests at once, faster by", f"{many['faster']:.2f}"],
            ["their hit rate", f"{many['hit_rate']:.1%}"],
            ["cost where nothing is shared", f"{nothing['cost']:.2%}"],
        ],
    )
    print_table(list(turns[0]), [[f"{value:.0f}" for value in row.values()] for row in turns])
    plot(turns, quick=arguments.quick)
    return {
        "sizes": asdict(size),
        "shared_prefix": system,
        "many_sharing": many,
        "multi_turn": turns,
        "nothing_shared": nothing,
    }


def plot(turns: list[dict[str, float]], *, quick: bool) -> None:
    """Time to first token over the turns of a conversation."""
    figure, (tokens, times) = plots.new_figure(2)
    xs = [row["turn"] for row in turns]
    tokens.plot(xs, [row["prompt_tokens"] for row in turns], marker="o", label="prompt")
    tokens.plot(xs, [row["found_tokens"] for row in turns], marker="s", label="found in the cache")
    tokens.legend(fontsize="small")
    tokens.set_ylim(bottom=0)
    plots.label(tokens, "A conversation", "turn", "tokens")
    times.plot(xs, [row["ttft_without_ms"] for row in turns], marker="o", label="without the cache")
    times.plot(xs, [row["ttft_ms"] for row in turns], marker="s", label="with it")
    times.legend(fontsize="small")
    times.set_ylim(bottom=0)
    plots.label(times, "Time to first token", "turn", "ms")
    plots.save(figure, "m6_prefix_reuse", quick=quick)
