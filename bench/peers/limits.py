"""What the machine itself can do: how fast it reads memory, and how fast it multiplies.

    python -m bench.peers.limits MODEL_DIR [--threads 2]

Prints one line of JSON. Reading: sums over as many bytes as the model's weights, which are read again and again as
decoding reads them, and over 2 GiB, of which no cache holds a part. Products: for each linear layer of the model 1,024
rows in bfloat16 by distinct weights of all layers, in each form that torch has; each shape counts with its fastest.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folovllm.common.model_config import ModelConfig, read_model_config

ROWS = 1024
_RUNS = 5
LARGE_BYTES = 2**31
SQUARE = 2048


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of bfloat16 that one decode step reads: all weights but the rows of an embedding that is no head too."""
    per_layer = sum(out * into for out, into in linear_shapes(config))
    return 2 * (config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size)


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's linear parts; q, k, v as one, gate and up as one."""
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, mlp = config.hidden_size, config.intermediate_size
    return [(heads + 2 * keys, hidden), (hidden, heads), (2 * mlp, hidden), (hidden, mlp)]


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of keys and values of one token in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def median_seconds(run: Callable[[], Any], runs: int = _RUNS) -> float:
    """The median of some runs after one that warms up."""
    run()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def read_gb_per_s(num_bytes: int) -> float:
    """The fastest of torch's ways to read a tensor of so many bytes once."""
    numbers = torch.ones(num_bytes // 8, dtype=torch.int64)
    half = torch.ones(num_bytes // 4)
    rows, column = half[: len(half) // 1024 * 1024].view(-1, 1024), torch.ones(1024)
    ways: list[Callable[[], Any]] = [
        numbers.sum,
        half.sum,
        lambda: torch.dot(half[: len(half) // 2], half[len(half) // 2 : len(half) // 2 * 2]),
        lambda: torch.mv(rows, column),
    ]
    return num_bytes / min(median_seconds(way) for way in ways) / 1e9


def product_forms(rows: Tensor, weights: list[Tensor]) -> list[Callable[[], list[Tensor]]]:
    """Ways to multiply rows [R, in] with each weight [out, in]; packed only where torch has oneDNN."""

    def linear() -> list[Tensor]:
        return [torch.nn.functional.linear(rows, weight) for weight in weights]

    def turned() -> list[Tensor]:
        columns = rows.t()
        return [torch.matmul(weight, columns) for weight in weights]

    forms = [linear, turned]
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) for weight in weights]

        def blocked() -> list[Tensor]:
            return [torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "") for weight in packed]

        forms.append(blocked)
    return forms


@torch.inference_mode()
def products_s(config: ModelConfig) -> float:
    """Seconds of all linear layers for 1,024 rows, each shape in its fastest form."""
    total = 0.0
    for outputs, inputs in linear_shapes(config):
        weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16) for _ in range(config.num_hidden_layers)]
        rows = torch.randn(ROWS, inputs, dtype=torch.bfloat16)
        total += min(median_seconds(form, 3) for form in product_forms(rows, weights))
    return total


@torch.inference_mode()
def largest_gflop_per_s() -> float:
    """bf16 product of square matrices, in the best form: the machine's rate where nothing else counts."""
    rows = torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16)
    best = min(
        median_seconds(form, 3) for form in product_forms(rows, [torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16)])
    )
    return 2 * SQUARE**3 / best / 1e9


def measure(folder: pathlib.Path) -> dict[str, float]:
    """All limits: names end with their units."""
    config = read_model_config(folder)
    size = weight_bytes(config)
    seconds = products_s(config)
    flops = 2 * ROWS * config.num_hidden_layers * sum(out * into for out, into in linear_shapes(config))
    return {
        "weight_bytes": size,
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "read_weights_gb_per_s": read_gb_per_s(size),
        "read_memory_gb_per_s": read_gb_per_s(LARGE_BYTES),
        "products_tokens_per_s": ROWS / seconds,
        "products_gflop_per_s": flops / seconds / 1e9,
        "square_gflop_per_s": largest_gflop_per_s(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.model)))


if __name__ == "__main__":
    main()
