"""The numbers that `/metrics` shows, in Prometheus' text form. Names follow vLLM's, with the prefix `folovllm:`.

Requests are counted where they are served, so of several server processes each counts its own; prometheus_client adds
them up through files in a shared folder. What concerns the engine is asked from it at each scrape and needs no sum.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from folovllm.common.messages.frontend_core import EngineStats
from folovllm.frontend.outputs import RequestMetrics, RequestOutput

PREFIX = "folovllm:"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TTFT = (*_FAST, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ANSWERS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: without the prefix; counters are shown with `_total` behind it.
        kind: how it is read.
        help: one line.
        labels: besides `model_name`, which all have.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUEST_METRICS = (
    MetricSpec("time_to_first_token_seconds", "histogram", "From arrival to the first token.", buckets=_TTFT),
    MetricSpec(
        "inter_token_latency_seconds",
        "histogram",
        "From one delivery of tokens of a request to the next.",
        buckets=_FAST,
    ),
    MetricSpec(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean time from one token of a request to the next.",
        buckets=_FAST,
    ),
    MetricSpec("e2e_request_latency_seconds", "histogram", "From arrival to the end.", buckets=_LONG),
    MetricSpec("request_queue_time_seconds", "histogram", "From arrival to the first step.", buckets=_LONG),
    MetricSpec("request_prefill_time_seconds", "histogram", "From the first step to the first token.", buckets=_LONG),
    MetricSpec("request_decode_time_seconds", "histogram", "From the first token to the end.", buckets=_LONG),
    MetricSpec("request_inference_time_seconds", "histogram", "From the first step to the end.", buckets=_LONG),
    MetricSpec("request_prompt_tokens", "histogram", "Tokens of a request's prompt.", buckets=_COUNTS),
    MetricSpec("request_generation_tokens", "histogram", "Tokens generated for a request.", buckets=_COUNTS),
    MetricSpec("request_params_n", "histogram", "Answers that a request asks for.", buckets=_ANSWERS),
    MetricSpec("request_success", "counter", "Answers that ended, by reason.", labels=("finished_reason",)),
    MetricSpec("request_rejected", "counter", "Requests that were refused, or failed, by status.", labels=("status",)),
    MetricSpec("http_requests", "counter", "HTTP requests answered.", labels=("method", "status")),
)
ENGINE_METRICS = (
    MetricSpec("num_requests_running", "gauge", "Requests that hold a slot."),
    MetricSpec("num_requests_waiting", "gauge", "Requests in the queue."),
    MetricSpec("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use; 1 is all."),
    MetricSpec("num_frontends", "gauge", "Frontends connected to the engine."),
    MetricSpec("prompt_tokens", "counter", "Prompt tokens of all admitted answers."),
    MetricSpec("generation_tokens", "counter", "Tokens generated."),
    MetricSpec("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    MetricSpec("prefix_cache_hits", "counter", "Of these, tokens that were found."),
    MetricSpec("num_preemptions", "counter", "Preemptions."),
    MetricSpec("preempted_tokens", "counter", "Tokens computed and thrown away by preemption."),
    MetricSpec("engine_steps", "counter", "Steps."),
    MetricSpec("worker_restarts", "counter", "Workers started in place of one that had ended."),
)


class ServerMetrics:
    """The counters and histograms of one server process."""

    def __init__(self, model_name: str, *, in_several_processes: bool = False) -> None:
        self._model = model_name
        self._several = in_several_processes
        self._registry = CollectorRegistry()
        self._histograms: dict[str, Histogram] = {}
        self._counters: dict[str, Counter] = {}
        for spec in REQUEST_METRICS:
            self._add(spec)
        self._gap = self._histograms["inter_token_latency_seconds"]

    def _add(self, spec: MetricSpec) -> None:
        name, labels = PREFIX + spec.name, ("model_name", *spec.labels)
        if spec.kind == "histogram":
            made = Histogram(name, spec.help, labels, registry=self._registry, buckets=spec.buckets)
            self._histograms[spec.name] = made.labels(self._model)
        else:
            self._counters[spec.name] = Counter(name, spec.help, labels, registry=self._registry)

    def count_http(self, method: str, status: int) -> None:
        """An HTTP request was answered; status 0: the client went away before."""
        known = method if method in {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"} else "other"
        self._counters["http_requests"].labels(self._model, known, str(status)).inc()

    def count_rejected(self, status: int) -> None:
        """A request for an answer was refused, or failed."""
        self._counters["request_rejected"].labels(self._model, str(status)).inc()

    def observe_gap(self, seconds: float) -> None:
        """Time since the request's tokens before these."""
        self._gap.observe(seconds)

    def observe_first_token(self, seconds: float) -> None:
        """Time from arrival to the first token."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def observe_end(self, output: RequestOutput, finish_reasons: Sequence[str]) -> None:
        """A request has ended: `output` is its last one."""
        for reason in finish_reasons:
            self._counters["request_success"].labels(self._model, reason).inc()
        self._observe("request_prompt_tokens", len(output.prompt_token_ids))
        self._observe("request_params_n", len(finish_reasons))
        if output.metrics is not None:
            self._observe_times(output.metrics)

    def _observe_times(self, times: RequestMetrics) -> None:
        self._observe("request_generation_tokens", times.num_generation_tokens)
        self._observe("e2e_request_latency_seconds", times.total_time)
        self._observe("request_time_per_output_token_seconds", times.time_per_output_token)
        self._observe("request_queue_time_seconds", times.time_in_queue)
        scheduled, first, end = times.first_scheduled_time, times.first_token_time, times.finished_time
        if scheduled is not None and first is not None and end is not None:
            self._observe("request_prefill_time_seconds", max(0.0, first - scheduled))
            self._observe("request_decode_time_seconds", max(0.0, end - first))
            self._observe("request_inference_time_seconds", max(0.0, end - scheduled))

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)

    def text(self, stats: EngineStats | None) -> bytes:
        """The page; without `stats` (the engine does not answer) the engine's metrics are left out."""
        registry = self._registry
        if self._several:
            registry = CollectorRegistry()
            _Sum(registry)  # type: ignore[no-untyped-call]
        page = generate_latest(registry)
        if stats is not None:
            engine = CollectorRegistry()
            engine.register(_EngineCollector(self._model, stats))
            page += generate_latest(engine)
        return page


class _Sum(MultiProcessCollector):
    """What all server processes have counted."""

    @staticmethod
    def merge(files: Iterable[str], accumulate: bool = True) -> Iterable[Metric]:
        """Passes over what is still empty: a process makes its file, and only then gives it a size, and a page that
        was asked for between the two was a 500.
        """
        made = [file for file in files if os.path.getsize(file)]
        merged: Iterable[Metric] = MultiProcessCollector.merge(made, accumulate)  # type: ignore[no-untyped-call]
        return merged


class _EngineCollector(Collector):
    """One answer of the engine as metrics."""

    def __init__(self, model_name: str, stats: EngineStats) -> None:
        self._model = model_name
        self._values = _engine_values(stats)

    def collect(self) -> Iterable[Metric]:
        for spec in ENGINE_METRICS:
            family = GaugeMetricFamily if spec.kind == "gauge" else CounterMetricFamily
            metric = family(PREFIX + spec.name, spec.help, labels=["model_name"])
            metric.add_metric([self._model], self._values[spec.name])
            yield metric


def _engine_values(stats: EngineStats) -> dict[str, float]:
    return {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": 1.0 - stats.num_free_blocks / max(1, stats.num_blocks),
        "num_frontends": stats.num_frontends,
        "prompt_tokens": stats.num_prompt_tokens_total,
        "generation_tokens": stats.num_output_tokens_total,
        "prefix_cache_queries": stats.num_cache_queries_total,
        "prefix_cache_hits": stats.num_cache_hits_total,
        "num_preemptions": stats.num_preemptions_total,
        "preempted_tokens": stats.num_lost_tokens_total,
        "engine_steps": stats.num_steps_total,
        "worker_restarts": stats.num_worker_restarts_total,
    }
