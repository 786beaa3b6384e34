"""Records of requests → figures: latencies and their percentiles, throughput, goodput. Names as vLLM's results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.http_request import Record
from folovllm.frontend.benchmark.load import Outcome

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between events",
    "e2el": "end to end",
}
SLO_METRICS = ("ttft", "tpot", "e2el")  # those that a request has one value of


def ttft(record: Record) -> float:
    """Seconds from sending to the first event with something new."""
    return record.times[0] - record.sent


def e2el(record: Record) -> float:
    """Seconds from sending to the last event with something new."""
    return record.times[-1] - record.sent


def tpot(record: Record) -> float | None:
    """Mean seconds from token to token after the first; None below two tokens."""
    gaps = record.output_tokens - 1
    return (record.times[-1] - record.times[0]) / gaps if gaps > 0 else None


def itl(record: Record) -> list[float]:
    """Seconds between events; an event can hold several tokens where the server, or the network, merged them."""
    return [later - earlier for earlier, later in zip(record.times, record.times[1:], strict=False)]


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """`ttft:200` and the like → metric → milliseconds.

    Raises:
        ConfigError: one is of another form, or names no metric that a request has one value of.
    """
    bounds: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition(":")
        try:
            bounds[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--goodput {text!r} is no METRIC:MILLISECONDS, such as ttft:200") from error
        if name not in SLO_METRICS:
            raise ConfigError(f"--goodput {text!r}: the metric must be one of {', '.join(SLO_METRICS)}")
        if not bounds[name] > 0:
            raise ConfigError(f"--goodput {text!r}: the bound must be above 0 ms")
    return bounds


def is_good(record: Record, bounds_ms: Mapping[str, float]) -> bool:
    """Whether an answered request kept all bounds; one without a second token has no tpot to break."""
    values = {"ttft": ttft(record), "tpot": tpot(record) or 0.0, "e2el": e2el(record)}
    return all(values[name] * 1e3 <= bound for name, bound in bounds_ms.items())


def serving_figures(outcome: Outcome, percentiles: Sequence[float], goodput_ms: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a run; times in milliseconds, rates per second, None where there is nothing to report."""
    good = [record for record in outcome.records if not record.error]
    duration = max([record.times[-1] for record in good], default=outcome.began) - outcome.began
    input_tokens, output_tokens = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)

    def rate(count: int) -> float | None:
        return count / duration if duration > 0 else None

    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcome.records) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(good)),
        "output_throughput": rate(output_tokens),
        "total_token_throughput": rate(input_tokens + output_tokens),
        "max_concurrent_requests": most_at_once(good),
    }
    if goodput_ms:
        figures["request_goodput"] = rate(sum(is_good(record, goodput_ms) for record in good))
        figures["goodput_bounds_ms"] = dict(goodput_ms)
    for name, values in latencies(good).items():
        figures |= _statistics(name, values, percentiles)
    figures |= _statistics("client_lag", [record.sent - record.planned for record in good], percentiles)
    return figures


def latencies(records: Sequence[Record]) -> dict[str, list[float]]:
    """Metric → its values over all answered requests, in seconds."""
    return {
        "ttft": [ttft(record) for record in records],
        "tpot": [value for record in records if (value := tpot(record)) is not None],
        "itl": [gap for record in records for gap in itl(record)],
        "e2el": [e2el(record) for record in records],
    }


def _statistics(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, spread and percentiles in milliseconds."""
    named = {f"p{percent:g}_{name}_ms": percent for percent in percentiles}
    if not values:
        return dict.fromkeys([f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", *named])
    in_ms = np.asarray(values) * 1e3
    return {
        f"mean_{name}_ms": float(in_ms.mean()),
        f"median_{name}_ms": float(np.median(in_ms)),
        f"std_{name}_ms": float(in_ms.std()),
        **{key: float(np.percentile(in_ms, percent)) for key, percent in named.items()},
    }


def most_at_once(records: Sequence[Record]) -> int:
    """Most requests that were in work at the same time."""
    changes = sorted([(r.sent, 1) for r in records] + [(r.times[-1], -1) for r in records])
    return int(max(np.cumsum([change for _, change in changes]))) if changes else 0
