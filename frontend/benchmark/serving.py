"""`folovllm bench serve` from a checked plan to a dictionary of results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from folovllm.frontend.benchmark.arrivals import arrival_times
from folovllm.frontend.benchmark.figures import METRICS, e2el, itl, serving_figures, tpot, ttft
from folovllm.frontend.benchmark.http_request import Record, Target
from folovllm.frontend.benchmark.load import Load, Outcome, put_load
from folovllm.frontend.benchmark.workload import Work

_MAX_ERRORS = 3  # that the summary shows


@dataclass(frozen=True, slots=True)
class Plan:
    """A run.

    Attributes:
        target: where requests go.
        works: what is asked.
        request_rate: requests a second on average; infinity: all at once.
        burstiness: of the arrivals; 1 is a Poisson process.
        max_concurrency: most requests at once; None: no bound.
        num_warmups: requests before the clock starts.
        seed: of the arrivals.
        percentiles: that are reported, in (0, 100).
        goodput_ms: metric → bound in milliseconds.
    """

    target: Target
    works: Sequence[Work]
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    num_warmups: int
    seed: int
    percentiles: Sequence[float]
    goodput_ms: Mapping[str, float]


def run_plan(plan: Plan, on_end: Callable[[Record], None]) -> tuple[Outcome, dict[str, Any]]:
    """Runs it; returns the records, and plan and figures as plain JSON values.

    Raises:
        ConfigError: rate or burstiness is out of range, or a warm-up failed.
    """
    arrivals = arrival_times(len(plan.works), plan.request_rate, plan.burstiness, plan.seed)
    outcome = put_load(plan.target, plan.works, Load(arrivals, plan.max_concurrency, plan.num_warmups), on_end)
    told = {
        "backend": plan.target.backend,
        "url": plan.target.url,
        "model_id": plan.target.model,
        "num_prompts": len(plan.works),
        "request_rate": plan.request_rate if plan.request_rate != float("inf") else "inf",
        "burstiness": plan.burstiness,
        "max_concurrency": plan.max_concurrency,
        "seed": plan.seed,
        "fields": msgspec.to_builtins(dict(plan.target.fields)),
    }
    return outcome, told | serving_figures(outcome, plan.percentiles, plan.goodput_ms)


def details(outcome: Outcome) -> dict[str, list[Any]]:
    """Every request's own values, in the order in which they came; times in seconds from the start."""
    records = outcome.records
    return {
        "start_times": [record.sent - outcome.began for record in records],
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [ttft(record) if record.times else None for record in records],
        "tpots": [tpot(record) if record.times else None for record in records],
        "itls": [itl(record) for record in records],
        "e2els": [e2el(record) if record.times else None for record in records],
        "errors": [record.error for record in records],
    }


def summary(result: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """The figures as text."""
    rows = [
        ("answered requests", f"{result['completed']:,}"),
        ("failed requests", f"{result['failed']:,}"),
        ("seconds", _number(result["duration"])),
        ("most requests at once", f"{result['max_concurrent_requests']:,}"),
        ("prompt tokens", f"{result['total_input_tokens']:,}"),
        ("output tokens", f"{result['total_output_tokens']:,}"),
        ("requests/s", _number(result["request_throughput"])),
        ("output tokens/s", _number(result["output_throughput"])),
        ("prompt and output tokens/s", _number(result["total_token_throughput"])),
    ]
    if "request_goodput" in result:
        bounds = ", ".join(f"{name} ≤ {bound:g} ms" for name, bound in result["goodput_bounds_ms"].items())
        rows.append((f"good requests/s ({bounds})", _number(result["request_goodput"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>12}" for name, value in rows]
    return "\n".join([*lines, "", *_latency_table(result, percentiles)])


def _latency_table(result: Mapping[str, Any], percentiles: Sequence[float]) -> list[str]:
    columns = ["mean", *(f"p{percent:g}" for percent in percentiles)]
    named = {**METRICS, "client_lag": "sent later than planned, by this client"}
    width = max(len(text) for text in named.values())
    head = f"{'milliseconds':<{width}}" + "".join(f"{column:>11}" for column in columns)
    return [head] + [
        f"{text:<{width}}" + "".join(f"{_number(result[f'{column}_{name}_ms']):>11}" for column in columns)
        for name, text in named.items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def errors_told(records: Sequence[Record]) -> str:
    """The first few different errors, "" for none."""
    different = list(dict.fromkeys(record.error for record in records if record.error))
    more = [f"… and {len(different) - _MAX_ERRORS} other errors"] if len(different) > _MAX_ERRORS else []
    return "\n".join([*different[:_MAX_ERRORS], *more])
