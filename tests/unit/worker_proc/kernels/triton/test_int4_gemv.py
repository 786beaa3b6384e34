"""Products of a few rows against a float64 dequantization, with everything that stands before or after them."""

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.layers.int4_words import Int4Words, pack_words
from tests.fakes.int4_weights import random_weight, relative_error, to_device
from tests.fakes.triton_device import half_types

EPS = 1e-6
CASES = [  # outputs, inputs, group size, symmetric, inputs dealt out in any order
    (16, 64, 16, True, False),
    (24, 96, 64, False, True),  # a smaller last group, padding, chunks of 16
    (24, 576, -1, False, False),  # one group, five blocks
    (24, 1024, 128, False, True),
    (8, 2048, 1024, True, True),
]


def rows_of(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device: torch.device, case: tuple[int, int, int, bool, bool], rows: int) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemv import add_int4_gemv, int4_gemv

    outputs, inputs, group_size, sym, shuffled = case
    weight = random_weight(outputs, inputs, group_size, sym=sym, shuffled=shuffled)
    words, plain = pack_words(to_device(weight, device)), weight.dequantize(torch.float64)
    assert isinstance(words, Int4Words)
    for dtype in half_types(device):
        x, residual, bias = rows_of(rows, inputs, dtype), rows_of(rows, outputs, dtype), rows_of(1, outputs, dtype)[0]
        norm = 1 + 0.1 * rows_of(1, inputs, dtype)[0]
        normed = F.rms_norm(x.float(), (inputs,), norm.float(), EPS).to(dtype).double()
        given, on_device = (norm.to(device), EPS), x.to(device)
        actual = int4_gemv(on_device, words, bias.to(device), given, dependent=False)
        assert actual.dtype == dtype
        assert relative_error(actual, normed @ plain.t() + bias.double()) < 5e-3
        gate, up = (normed @ plain.t()).chunk(2, 1)
        actual = int4_gemv(on_device, words, None, given, gated=True, dependent=False)
        assert relative_error(actual, F.silu(gate) * up) < 5e-3
        actual = residual.clone().to(device)
        add_int4_gemv(actual, on_device, words, bias.to(device), dependent=False)
        assert relative_error(actual, residual.double() + x.double() @ plain.t() + bias.double()) < 5e-3


def test_a_gated_product_with_biases_and_one_without_a_norm(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemv import int4_gemv

    weight = random_weight(16, 128, 32, sym=True)
    words, plain = pack_words(to_device(weight, device)), weight.dequantize(torch.float64)
    assert words is not None
    x, bias = rows_of(2, 128, torch.float16), rows_of(1, 16, torch.float16)[0]
    product = x.double() @ plain.t() + bias.double()
    actual = int4_gemv(x.to(device), words, bias.to(device), gated=True, dependent=False)
    assert relative_error(actual, F.silu(product[:, :8]) * product[:, 8:]) < 5e-3
    assert relative_error(int4_gemv(x.to(device), words, bias.to(device), dependent=False), product) < 5e-3
