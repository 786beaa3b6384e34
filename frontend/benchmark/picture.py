"""The picture of a serving run: how latencies are distributed, and what was going on over time. Needs matplotlib."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from folovllm.frontend.benchmark.figures import METRICS, latencies
from folovllm.frontend.benchmark.http_request import Record
from folovllm.frontend.benchmark.load import Outcome

_MAX_SLICES = 100  # of the time axis
_EVENTS_PER_SLICE = 40  # fewer make a comb of the line


def save_serving_picture(outcome: Outcome, title: str, path: pathlib.Path) -> None:
    """Writes a PNG. At least one request must have been answered."""
    from matplotlib.figure import Figure

    good = [record for record in outcome.records if not record.error]
    figure = Figure(figsize=(12, 4), layout="constrained")
    spread, course = figure.subplots(1, 2)
    _draw_spread(spread, good)
    _draw_course(course, good, outcome.began)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_spread(ax: Any, records: Sequence[Record]) -> None:
    for name, values in latencies(records).items():
        if values:
            in_ms = np.sort(np.asarray(values)) * 1e3
            ax.step(in_ms, np.arange(1, len(in_ms) + 1) / len(in_ms), where="post", label=METRICS[name])
    ax.set_xscale("log")
    ax.set(title="Latencies", xlabel="ms", ylabel="share of all that is not above", ylim=(0, 1.02))
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize="small", loc="upper left")


def _draw_course(ax: Any, records: Sequence[Record], began: float) -> None:
    edges, rates, in_work = course_of(records, began)
    middles = (edges[:-1] + edges[1:]) / 2
    ax.plot(middles, rates, label="output tokens/s")
    ax.set(title="Over time", xlabel="seconds", ylabel="output tokens/s", ylim=(0, None))
    ax.grid(visible=True, alpha=0.3)
    other = ax.twinx()
    other.plot(middles, in_work, color="C1", label="requests in work")
    other.set(ylabel="requests in work", ylim=(0, None))
    lines = [*ax.get_lines(), *other.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], fontsize="small")


def course_of(records: Sequence[Record], began: float) -> tuple[Any, Any, Any]:
    """Edges of slices of time in seconds, output tokens/s in each, and requests in work at its middle.

    An event counts for as many tokens as one of its request's events holds on average.
    """
    ends = np.array([record.times[-1] - began for record in records])
    sent = np.array([record.sent - began for record in records])
    times = np.concatenate([np.asarray(record.times) - began for record in records])
    tokens = np.concatenate([np.full(len(r.times), r.output_tokens / len(r.times)) for r in records])
    num_slices = min(_MAX_SLICES, max(2, len(times) // _EVENTS_PER_SLICE))
    edges = np.linspace(0.0, max(float(ends.max()), 1e-3), num_slices + 1)
    counts, _ = np.histogram(times, edges, weights=tokens)
    middles = (edges[:-1] + edges[1:]) / 2
    in_work = [int(((sent <= middle) & (ends > middle)).sum()) for middle in middles]
    return edges, counts / np.diff(edges), np.array(in_work)
