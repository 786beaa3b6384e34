"""One line about the engine every so many seconds, while it works.

    Running: 8 reqs, Waiting: 3 reqs, KV cache usage: 41.2 %, Prefix cache hit rate: 63.0 %, Prompt: 812.4 tokens/s,
    Generation: 201.7 tokens/s, Preemptions: 0

Throughput, hit rate and preemptions are those of the time since the line before, the rest is how it stands now. Behind
it stand the worker's restarts since start, if there were any, and that there is no worker at the moment, if that is so.
An engine that has become idle says so once, then nothing until it has work again.
"""

import math
from typing import NamedTuple

from folovllm.common.messages.frontend_core import EngineStats


class _Totals(NamedTuple):
    prompt: int = 0
    output: int = 0
    queries: int = 0
    hits: int = 0
    preemptions: int = 0

    def since(self, earlier: "_Totals") -> "_Totals":
        return _Totals(*(now - then for now, then in zip(self, earlier, strict=True)))


class StateLog:
    """Says when a line is due, and what it is; `interval_s` of 0 is never."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._since_s: float | None = None  # None while the engine is idle
        self._due_s = -math.inf if interval_s else math.inf
        self._totals = _Totals()

    def is_due(self, now_s: float, is_working: bool) -> bool:
        """Whether `line` is to be called now. To be asked in every turn of the engine."""
        if now_s < self._due_s:
            return False
        if self._since_s is not None:
            return True
        if is_working:
            self._since_s = now_s
            self._due_s = now_s + self._interval_s
        return False

    def line(self, now_s: float, stats: EngineStats) -> str:
        """What happened since the last line, or since work began; `is_due` must have said yes."""
        assert self._since_s is not None, "no line is due"
        seconds = now_s - self._since_s
        is_working = stats.num_running + stats.num_waiting > 0
        self._since_s = now_s if is_working else None
        self._due_s = now_s + self._interval_s if is_working else -math.inf
        totals = _totals(stats)
        new, self._totals = totals.since(self._totals), totals
        parts = [
            f"Running: {stats.num_running} reqs",
            f"Waiting: {stats.num_waiting} reqs",
            f"KV cache usage: {_percent(stats.num_blocks - stats.num_free_blocks, stats.num_blocks)}",
            f"Prefix cache hit rate: {_percent(new.hits, new.queries)}",
            f"Prompt: {new.prompt / seconds:.1f} tokens/s",
            f"Generation: {new.output / seconds:.1f} tokens/s",
            f"Preemptions: {new.preemptions}",
        ]
        if stats.num_worker_restarts_total:
            parts.append(f"Worker restarts: {stats.num_worker_restarts_total}")
        if stats.is_recovering:
            parts.append("waiting for the next worker")
        return ", ".join(parts)


def _totals(stats: EngineStats) -> _Totals:
    return _Totals(
        stats.num_prompt_tokens_total,
        stats.num_output_tokens_total,
        stats.num_cache_queries_total,
        stats.num_cache_hits_total,
        stats.num_preemptions_total,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
