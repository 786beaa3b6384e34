"""What a long prompt does to the requests that are running: unchunked, in fixed chunks, with a target (M5).

Eight requests stream; once each has a few tokens, a prompt of 4,000 tokens arrives. Measured: the gaps between the
tokens of the eight until the prompt's first token, and how long that takes. Every setting is an engine of its own; it
computes one such prompt before, then two that count. The rounds go through all settings in turn. Run it through

    python -m bench.milestones --only M5

A step is late for all eight streams at once, and with a target of 250 ms a prompt is a dozen steps: the 99th percentile
of one prompt's gaps is its slowest step. So gaps are taken together over all prompts of all rounds. Times to the first
token are compared within a round, since the machine may be slower in the next.
"""

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bench import plots
from bench.common import print_table
from bench.workload import exactly, percentile, random_prompts
from folovllm import LLM, AsyncLLM
from folovllm.frontend.engine_options import EngineOptions

NUM_STREAMS = 8
TARGETS_MS = (60.0, 120.0, 250.0)
_STREAM_PROMPT = 64
_TOKENS_BEFORE = 12  # of each stream, before the long prompt arrives
_PROMPTS = 2  # long ones of each engine in a round, without the one that warms up
LATE = 1.3  # times the target: the goal for the 99th percentile
_UNCHUNKED = "unchunked"


@dataclass(frozen=True)
class Setting:
    """An engine's options, and what to call them."""

    name: str
    options: EngineOptions
    chunk: int | None = None
    target_ms: float | None = None


@dataclass
class Figures:
    """Seconds, by round."""

    gaps: list[list[float]] = field(default_factory=list)
    ttft: list[list[float]] = field(default_factory=list)

    def all_gaps(self) -> list[float]:
        return list(itertools.chain(*self.gaps))

    def row(self) -> dict[str, float]:
        """Over all rounds."""
        gaps = self.all_gaps()
        return {
            "gap_p50_ms": statistics.median(gaps) * 1e3,
            "gap_p99_ms": percentile(gaps, 99) * 1e3,
            "gap_max_ms": max(gaps) * 1e3,
            "ttft_ms": statistics.median(itertools.chain(*self.ttft)) * 1e3,
        }

    def rounds(self) -> dict[str, list[float]]:
        """Each round by itself."""
        return {
            "gap_p99_ms": [percentile(gaps, 99) * 1e3 for gaps in self.gaps],
            "ttft_ms": [statistics.median(times) * 1e3 for times in self.ttft],
        }


def settings(chunks: Iterable[int], prompt_len: int) -> list[Setting]:
    whole: EngineOptions = {"max_num_batched_tokens": prompt_len + 64}
    found = [Setting(_UNCHUNKED, whole)]
    found += [Setting(f"chunks of {chunk}", {"max_num_batched_tokens": chunk}, chunk=chunk) for chunk in chunks]
    found += [Setting(f"target {ms:.0f} ms", {"target_itl_ms": ms}, target_ms=ms) for ms in TARGETS_MS]
    return found


async def _stream(llm: AsyncLLM, prompt: list[int], num_tokens: int, times: list[float]) -> None:
    """Notes when each token arrives; without text, since a token that is half a character gives none until the next."""
    params = msgspec.structs.replace(exactly(num_tokens), detokenize=False)
    async for output in llm.generate(prompt, params):
        now = time.perf_counter()
        times += [now] * len(output.outputs[0].token_ids)


async def one_prompt(llm: AsyncLLM, prompt_len: int, seed: int) -> tuple[list[float], float]:
    """Eight streams, then the long prompt; all are new to the engine. The streams' gaps, and the prompt's TTFT."""
    *short, long = random_prompts([_STREAM_PROMPT] * NUM_STREAMS + [prompt_len], seed)
    streams: list[list[float]] = [[] for _ in short]
    tasks = [
        asyncio.create_task(_stream(llm, prompt, 1000, times)) for prompt, times in zip(short, streams, strict=True)
    ]
    while min(map(len, streams)) < _TOKENS_BEFORE:
        if done := [task for task in tasks if task.done()]:
            raise RuntimeError(f"a stream ended before the prompt came: {done[0]}")
        await asyncio.sleep(0.005)
    first: list[float] = []
    arrival = time.perf_counter()
    await _stream(llm, long, 1, first)
    await asyncio.sleep(0.1)  # the token after it, so that the last gap is whole
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return gaps_between(streams, arrival, first[0]), first[0] - arrival


def gaps_between(streams: list[list[float]], begin: float, end: float) -> list[float]:
    """From token to token, of those gaps that overlap the time from `begin` to `end`."""
    return [
        later - earlier
        for times in streams
        for earlier, later in itertools.pairwise(times)
        if later > begin and earlier < end
    ]


def num_prompts(arguments: argparse.Namespace) -> int:
    """Long prompts of each engine that count."""
    return 1 if arguments.quick else _PROMPTS


async def _measure(arguments: argparse.Namespace, chosen: list[Setting], prompt_len: int) -> dict[str, Figures]:
    figures = {setting.name: Figures() for setting in chosen}
    seed = arguments.seed
    for turn in range(arguments.repeats):
        for setting in chosen:
            options: EngineOptions = {
                "dtype": arguments.dtype,
                "device": arguments.device,
                "max_num_seqs": 16,
                "max_num_batched_tokens": 2048,
                **setting.options,
            }
            gaps: list[float] = []
            ttft: list[float] = []
            async with AsyncLLM(arguments.model, **options) as llm:
                for prompt in range(1 + num_prompts(arguments)):  # the first teaches what steps cost
                    more_gaps, seconds = await one_prompt(llm, prompt_len, seed)
                    seed += 1
                    if prompt:
                        gaps += more_gaps
                        ttft.append(seconds)
            figures[setting.name].gaps.append(gaps)
            figures[setting.name].ttft.append(ttft)
            p99_ms, ttft_ms = percentile(gaps, 99) * 1e3, statistics.median(ttft) * 1e3
            print(f"M5 round {turn + 1}, {setting.name}: p99 {p99_ms:.0f} ms, TTFT {ttft_ms:.0f} ms", flush=True)
    return figures


def throughput_lost(arguments: argparse.Namespace, prompt_len: int) -> dict[str, Any]:
    """Sixteen prompts and short answers, all at once: the default budget against steps that hold two whole prompts."""
    budgets = {"default": 2048, "unchunked": 2 * prompt_len}
    seconds: dict[str, list[float]] = {name: [] for name in budgets}
    engines = {
        name: LLM(arguments.model, dtype=arguments.dtype, device=arguments.device, max_num_batched_tokens=budget)
        for name, budget in budgets.items()
    }
    for turn in range(arguments.repeats):
        for number, (name, llm) in enumerate(engines.items()):
            prompts = random_prompts([prompt_len // 2] * 16, arguments.seed + 50 + 2 * turn + number)
            start = time.perf_counter()
            llm.generate(prompts, exactly(32), use_tqdm=False)
            seconds[name].append(time.perf_counter() - start)
    for llm in engines.values():
        llm.close()
    ratios = [slow / fast for slow, fast in zip(seconds["default"], seconds["unchunked"], strict=True)]
    return {"seconds": seconds, "lost": statistics.median(ratios) - 1}


def compare(figures: dict[str, Figures], chosen: list[Setting]) -> list[dict[str, Any]]:
    """For each target: is it kept, and how does the prompt fare against the best fixed chunk that is as smooth?"""
    rows = {name: each.row() for name, each in figures.items()}
    found = []
    for setting in chosen:
        if setting.target_ms is None:
            continue
        mine = figures[setting.name]
        p99_ms, gaps = rows[setting.name]["gap_p99_ms"], mine.all_gaps()
        as_smooth = {
            ttft_ratio(mine, figures[other.name]): other.chunk
            for other in chosen
            if other.chunk is not None and rows[other.name]["gap_p99_ms"] <= max(p99_ms, setting.target_ms)
        }
        slowest = max(as_smooth, default=None)
        found.append(
            {
                "target_ms": setting.target_ms,
                "p99_of_target": p99_ms / setting.target_ms,
                "p99_of_target_by_round": [each / setting.target_ms for each in mine.rounds()["gap_p99_ms"]],
                "late": sum(gap * 1e3 > LATE * setting.target_ms for gap in gaps) / len(gaps),
                "best_chunk": None if slowest is None else as_smooth[slowest],
                "ttft_of_best_chunk": slowest,
            }
        )
    return found


def ttft_ratio(mine: Figures, other: Figures) -> float:
    """Times to the first token, one over the other in the same round; the median of the rounds."""
    pairs = zip(mine.rounds()["ttft_ms"], other.rounds()["ttft_ms"], strict=True)
    return statistics.median(first / second for first, second in pairs)


def m5(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gaps of running requests while a long prompt arrives."""
    prompt_len = 200 if arguments.quick else 4000
    chunks = (32, 64) if arguments.quick else (64, 96, 128, 192, 256, 384, 512)
    chosen = settings(chunks, prompt_len)
    figures = asyncio.run(_measure(arguments, chosen, prompt_len))
    rows = {name: each.row() for name, each in figures.items()}
    compared = compare(figures, chosen)
    lost = throughput_lost(arguments, prompt_len)
    print(f"\nM5: {NUM_STREAMS} streams while a prompt of {prompt_len} tokens arrives, {arguments.dtype}")
    headers = ["", "gap p50 ms", "gap p99 ms", "gap max ms", "TTFT of the prompt ms"]
    print_table(headers, [[name, *(f"{value:.0f}" for value in row.values())] for name, row in rows.items()])
    for each in compared:
        print(each)
    print(f"throughput lost to chunks at no target: {lost['lost']:.1%}")
    plot(rows, chosen, prompt_len, quick=arguments.quick)
    return {
        "num_streams": NUM_STREAMS,
        "prompt_len": prompt_len,
        "repeats": arguments.repeats,
        "prompts_per_round": num_prompts(arguments),
        "rows": rows,
        "rounds": {name: each.rounds() for name, each in figures.items()},
        "targets": compared,
        "throughput": lost,
    }


def plot(rows: dict[str, dict[str, float]], chosen: list[Setting], prompt_len: int, *, quick: bool) -> None:
    """Each setting as a point: the streams' worst gaps against the wait for the prompt's first token."""
    figure, (ax,) = plots.new_figure()
    for kind, marker in (("chunk", "o"), ("target_ms", "s"), ("", "^")):
        members = [
            setting
            for setting in chosen
            if (setting.name == _UNCHUNKED if not kind else getattr(setting, kind) is not None)
        ]
        xs = [rows[setting.name]["ttft_ms"] / 1e3 for setting in members]
        ys = [rows[setting.name]["gap_p99_ms"] for setting in members]
        label = {"chunk": "fixed chunks", "target_ms": "target for the gap", "": _UNCHUNKED}[kind]
        ax.plot(xs, ys, marker=marker, linestyle="-" if kind == "chunk" else "", label=label)
        for setting, x, y in zip(members, xs, ys, strict=True):
            text = str(setting.chunk or (f"{setting.target_ms:.0f} ms" if setting.target_ms else ""))
            ax.annotate(text, (x, y), textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    ax.set_yscale("log")
    ax.legend(fontsize="small")
    title = f"{NUM_STREAMS} streams while {prompt_len:,} prompt tokens arrive"
    plots.label(ax, title, "time to the prompt's first token, s", "99th percentile of the streams' gaps, ms")
    plots.save(figure, "m5_chunked_prefill", quick=quick)
