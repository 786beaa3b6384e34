"""The GPU's sections of docs/performance.md, from `bench.gpu`'s and `bench.gpu_steps`' results; see `bench.report`."""

from collections.abc import Callable, Sequence
from typing import Any

# Of issue-sized workloads with Qwen3-0.6B's shape: what the fewest bytes or operations take on an H100 that reads
# 3.2 TB/s and multiplies 800 TFLOP/s in bf16; a card's own limits follow from its own rates.
_READ, _PRODUCTS = 3.2, 800.0
_BYTES, _OPERATIONS = "read_TB_per_s", "bf16_TFLOP_per_s"
# workload, figure, what it is called, goal (on an H100), limit there, what bounds it, whether more is better
_ROWS: tuple[tuple[str, str, str, str, float | None, str, bool], ...] = (
    ("W1 mixed", "output tokens/s", "256 requests, 100–1,024 + 100–1,024 tokens, temperature 0.6: output tokens/s",
     "≥ 19,000", 24000, _BYTES, True),
    ("fp8 W1 mixed", "output tokens/s", "the same with an FP8 KV cache", "≥ 27,000", 44000, _BYTES, True),
    ("W2 1 request", "ms per step", "1 request, 128 + 512 tokens: ms a token", "≤ 0.95", 0.38, _BYTES, False),
    ("W3 32 requests", "ms per step", "32 requests, 128 + 256: ms a step", "≤ 1.8", 0.66, _BYTES, False),
    ("W3 256 requests", "ms per step", "256 requests, 128 + 256: ms a step", "≤ 4.8", 2.69, _BYTES, False),
    ("fp8 W3 256 requests", "ms per step", "256 requests with an FP8 KV cache: ms a step", "", None, _BYTES, False),
    ("W4 1,024 tokens", "ms", "first token after 1,024 tokens, ms", "≤ 8", 1.6, _OPERATIONS, False),
    ("W4 4,096 tokens", "ms", "first token after 4,096 tokens, ms", "≤ 15", 8, _OPERATIONS, False),
    ("W4 16,384 tokens", "ms", "first token after 16,384 tokens, ms", "≤ 95", 70, _OPERATIONS, False),
    ("W4b 64 x 1,024", "prompt tokens/s", "64 prompts of 1,024 tokens: prompt tokens/s", "≥ 420,000", 700000,
     _OPERATIONS, True),
    ("prefix 4,096 tokens", "hit, ms", "first token after 4,096 tokens, all but 16 of them cached, ms", "", None,
     _BYTES, False),
    ("server 1 streams", "output tokens/s", "`folovllm serve`, 512 + 128 tokens, 1 stream: output tokens/s", "≥ 900",
     None, _BYTES, True),
    ("server 32 streams", "output tokens/s", "32 streams", "≥ 14,000", None, _BYTES, True),
    ("server 256 streams", "output tokens/s", "256 streams", "≥ 22,000", None, _BYTES, True),
)  # fmt: skip

Table = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def gpu(content: dict[str, Any], table: Table) -> str:
    """Workloads beside their goals and this card's limits; then 4-bit weights beside bf16."""
    limits, workloads = content["limits"], content["workloads"]
    rates = {_BYTES: limits[_BYTES] / _READ, _OPERATIONS: limits[_OPERATIONS] / _PRODUCTS}
    rows: list[list[object]] = []
    for name, figure, shown, goal, limit, bound, more_is_better in _ROWS:
        if name not in workloads:
            continue
        value = workloads[name]["median"][figure]
        cells: list[object] = [shown, number(value), goal, "", ""]
        if limit is not None:
            here = limit * rates[bound] if more_is_better else limit / rates[bound]
            cells[3:] = [number(here), f"{value / here if more_is_better else here / value:.0%}"]
        rows.append(cells)
    rows.append(["start to first token, s", f"{content['start_s']:.1f}", "≤ 20", "", ""])
    text = (
        f"{limits['card']}, torch {limits['torch']}: {limits[_BYTES]:.2f} TB/s of reads, "
        f"{limits[_OPERATIONS]:.0f} TFLOP/s of bf16 products, measured in the same call.\n\n"
    )
    text += table(["workload", "median", "goal (for an H100)", "limit of this card", "share of the limit"], rows)
    if "four_bits" in content:
        text += "\n\n" + four_bits(content, table)
    effect = workloads.get("fp8 effect on logits")
    if effect is not None:
        error = effect["median"]["relative error of logits"]
        text += f"\n\nAn FP8 cache changes the logits of these random weights by {error:.1%} of their norm."
    return text


def four_bits(content: dict[str, Any], table: Table) -> str:
    """4-bit weights beside bf16."""
    return table(["4-bit weights (groups of 128)", "bf16", "4 bits", "goal (for an H100)"], content["four_bits"])


def gpu_steps(content: dict[str, Any], table: Table) -> str:
    """Where a step's time goes."""
    kinds = ("attention", "products", "heads, cache", "norm", "activation", "sampling")
    rows: list[list[object]] = []
    for name, step in content["steps"].items():
        if name == "start":
            continue
        alone = step.get("alone_ms")
        busy = [f"{step['kinds_ms'].get(kind, 0.0):.2f}" for kind in kinds]
        rows.append([name, f"{step['step_ms']:.2f}", f"{alone:.2f}" if alone else "", f"{step['host_ms']:.2f}", *busy])
    return f"{content['card']}, ms.\n\n" + table(["step", "pace", "alone", "host", *kinds], rows)


def number(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
