"""The GPU's tables: goals and a card's own limits beside what was measured."""

from typing import Any

from bench.gpu_report import gpu, gpu_steps, number
from bench.report import table

LIMITS = {"card": "a card", "torch": "2.11", "read_TB_per_s": 6.4, "bf16_TFLOP_per_s": 400.0}


def result(**medians: dict[str, float]) -> dict[str, Any]:
    workloads = {name.replace("_", " "): {"median": median} for name, median in medians.items()}
    return {"limits": LIMITS, "start_s": 6.84, "workloads": workloads}


def test_limits_follow_the_cards_own_rates() -> None:
    """Twice the reads halve what bytes take; half the products double what operations take."""
    content = result(W2_1_request={"ms per step": 0.95}, W1_mixed={"output tokens/s": 24000.0})
    content["workloads"]["W4 4,096 tokens"] = {"median": {"ms": 20.0}}
    text = gpu(content, table)
    assert "| 1 request, 128 + 512 tokens: ms a token | 0.95 | ≤ 0.95 | 0.19 | 20% |" in text
    assert "| 24,000 | ≥ 19,000 | 48,000 | 50% |" in text
    assert "| first token after 4,096 tokens, ms | 20.0 | ≤ 15 | 16.0 | 80% |" in text
    assert "| start to first token, s | 6.8 | ≤ 20 |" in text
    assert "6.40 TB/s" in text and "streams" not in text and "4-bit" not in text


def test_four_bits_and_fp8_stand_below_where_they_were_measured() -> None:
    content = result(fp8_effect_on_logits={"relative error of logits": 0.055})
    content["four_bits"] = [["step of 8, ms", 1.2, 0.9, "<= 1.1"]]
    text = gpu(content, table)
    assert "| step of 8, ms | 1.2 | 0.9 | <= 1.1 |" in text and "by 5.5% of their norm" in text


def test_steps_show_their_parts() -> None:
    step = {"step_ms": 1.25, "host_ms": 0.5, "kinds_ms": {"attention": 0.27, "products": 0.4}}
    steps = {"start": {"load": 1.0}, "decode 8": step, "prefill 1 x 128": step | {"alone_ms": 2.5}}
    text = gpu_steps({"card": "a card", "steps": steps}, table)
    assert "| decode 8 | 1.25 |  | 0.50 | 0.27 | 0.40 | 0.00 |" in text
    assert "| prefill 1 x 128 | 1.25 | 2.50 |" in text and "start" not in text


def test_numbers_have_as_many_digits_as_mean_something() -> None:
    assert [number(value) for value in (26815.2, 88.54, 7.226)] == ["26,815", "88.5", "7.23"]
