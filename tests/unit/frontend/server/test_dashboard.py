"""The Grafana dashboard asks for metrics that exist, and draws every one that an operator looks at."""

import json
import re
from typing import Any

from folovllm.frontend.server.metrics import ENGINE_METRICS, PREFIX, REQUEST_METRICS, MetricSpec
from tests.sources import ROOT

# Not drawn: the figure is in another one, or tells nothing over time.
_LEFT_OUT = {
    "request_time_per_output_token_seconds",
    "request_inference_time_seconds",
    "request_params_n",
    "num_frontends",
    "engine_steps",
}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "folovllm.json").read_text(encoding="utf-8"))
    return loaded


def shown_names(spec: MetricSpec) -> set[str]:
    """Names of the series of a metric."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {PREFIX + spec.name + ending for ending in endings[spec.kind]}


def test_every_expression_names_metrics_that_exist() -> None:
    known = {name for spec in (*REQUEST_METRICS, *ENGINE_METRICS) for name in shown_names(spec)}
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        names = set(re.findall(rf"{PREFIX}\w+", expression))
        assert names
        assert names <= known, expression
        assert expression.count("(") == expression.count(")")


def test_every_metric_is_drawn_or_left_out_on_purpose() -> None:
    text = json.dumps(dashboard()["panels"])
    drawn = {spec.name for spec in (*REQUEST_METRICS, *ENGINE_METRICS) if any(n in text for n in shown_names(spec))}
    assert {spec.name for spec in (*REQUEST_METRICS, *ENGINE_METRICS)} - drawn == _LEFT_OUT


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    panels = dashboard()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
