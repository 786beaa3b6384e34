"""What the limits count; how fast this machine is decides nothing here."""

import pathlib
from typing import Any

import pytest
import torch

from bench.peers import limits
from folovllm.common.model_config import ModelConfig, read_model_config
from tests.fakes.model_folder import write_model_folder

DEMO: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.fixture
def demo_config(tmp_path: pathlib.Path) -> ModelConfig:
    return read_model_config(write_model_folder(tmp_path, with_tokenizer=False, **DEMO))


def test_bytes_of_the_demo_models_shape(demo_config: ModelConfig) -> None:
    """Its file has 269,060,552 bytes; norms are left out, 0.07 MB."""
    assert limits.weight_bytes(demo_config) == 268_959_744
    assert limits.kv_bytes_per_token(demo_config) == 23_040


def test_linear_parts_of_a_layer(demo_config: ModelConfig) -> None:
    assert limits.linear_shapes(demo_config) == [(960, 576), (576, 576), (3072, 576), (576, 1536)]


def test_the_median_run_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 9.0, 10.0, 13.0, 20.0, 21.0])
    calls = []
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert limits.median_seconds(lambda: calls.append(1), 3) == 3.0
    assert len(calls) == 4


def test_every_way_of_reading_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 3.0, 5.0])
    ran = []

    def timed(way: object, runs: int = 1) -> float:
        ran.append(way)
        return next(seconds)

    monkeypatch.setattr(limits, "median_seconds", timed)
    assert limits.read_gb_per_s(1 << 20) == pytest.approx((1 << 20) / 2.0 / 1e9)
    assert len(ran) == 4


def test_every_form_multiplies_by_every_weight() -> None:
    rows = torch.randn(4, 32, dtype=torch.bfloat16)
    weights = [torch.randn(16, 32, dtype=torch.bfloat16) for _ in range(2)]
    forms = limits.product_forms(rows, weights)
    assert len(forms) >= 2
    expected = [rows @ weight.t() for weight in weights]
    for form in forms:
        for product, right in zip(form(), expected, strict=True):
            turned = product if product.shape == right.shape else product.t()
            torch.testing.assert_close(turned, right, rtol=0.05, atol=0.2)


def test_all_of_a_small_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LARGE_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "SQUARE", 64)
    found = limits.measure(write_model_folder(tmp_path, with_tokenizer=False))
    assert set(found) == {
        *("weight_bytes", "kv_bytes_per_token", "read_weights_gb_per_s", "read_memory_gb_per_s"),
        *("products_tokens_per_s", "products_gflop_per_s", "square_gflop_per_s"),
    }
    assert all(value > 0 for value in found.values())
