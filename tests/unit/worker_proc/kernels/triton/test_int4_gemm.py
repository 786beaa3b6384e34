"""Products of tens of rows against a float64 dequantization; how they are cut."""

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.layers.int4_words import Int4Words, pack_words
from tests.fakes.int4_weights import random_weight, relative_error, to_device
from tests.fakes.triton_device import half_types

CASES = [  # outputs, inputs, group size, symmetric, inputs dealt out in any order
    (80, 64, 16, True, False),  # a last tile that is not full
    (48, 96, 64, False, True),  # a smaller last group, padding, chunks of 16
    (32, 576, -1, False, False),  # one group, five blocks
    (64, 1024, 128, True, True),
    (64, 1024, 128, False, False),
]


def made(device: torch.device, case: tuple[int, int, int, bool, bool]) -> tuple[Int4Words, torch.Tensor]:
    """The weight in words, and in float64 with inputs in their order."""
    outputs, inputs, group_size, sym, shuffled = case
    weight = random_weight(outputs, inputs, group_size, sym=sym, shuffled=shuffled)
    words, plain = pack_words(to_device(weight, device)), weight.dequantize(torch.float64)
    assert words is not None
    return words, plain if words.order is None else plain[:, words.order.cpu()]


def rows_of(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("rows", [2, 9, 70])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device: torch.device, case: tuple[int, int, int, bool, bool], rows: int) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemm import SplitScratch, add_int4_gemm, int4_gemm

    words, plain = made(device, case)
    outputs, inputs = plain.shape
    scratch = SplitScratch(device)
    for dtype in half_types(device):
        x, residual, bias = rows_of(rows, inputs, dtype), rows_of(rows, outputs, dtype), rows_of(1, outputs, dtype)[0]
        on_device, product = x.to(device), x.double() @ plain.t()
        actual = int4_gemm(on_device, words, bias.to(device), dependent=False)
        assert actual.dtype == dtype and relative_error(actual, product + bias.double()) < 5e-3
        gate, up = product.chunk(2, 1)
        actual = int4_gemm(on_device, words, None, gated=True, dependent=False)
        assert relative_error(actual, F.silu(gate) * up) < 5e-3
        actual = residual.clone().to(device)
        add_int4_gemm(actual, on_device, words, bias.to(device), scratch, dependent=False)
        assert relative_error(actual, residual.double() + product + bias.double()) < 5e-3
    assert not bool(scratch.num_done.any())


def test_a_gated_product_with_biases(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemm import int4_gemm

    words, plain = made(device, (64, 128, 32, True, False))
    x, bias = rows_of(5, 128, torch.float16), rows_of(1, 64, torch.float16)[0]
    gate, up = (x.double() @ plain.t() + bias.double()).chunk(2, 1)
    actual = int4_gemm(x.to(device), words, bias.to(device), gated=True, dependent=False)
    assert relative_error(actual, F.silu(gate) * up) < 5e-3


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 1024), (576, 1536), (1024, 2048), (1024, 3072), (4096, 4096)])
def test_inputs_are_split_as_far_as_the_scratch_suffices(device: torch.device, outputs: int, inputs: int) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemm import SplitScratch, choose_add_tiling, choose_tiling

    empty = torch.empty(outputs, inputs // 8, dtype=torch.int32, device=device)
    words = Int4Words(empty, torch.empty(inputs // 128, outputs, device=device), None, None, inputs, 128, 128)
    scratch = SplitScratch(device)
    for rows in range(1, 300, 3):
        tiling = choose_add_tiling(rows, words)
        tiles = -(-rows // tiling.rows) * -(-outputs // tiling.block)
        assert inputs // 8 % (tiling.splits * tiling.slice_words) == 0
        assert (tiling.splits > 1) == (2 * tiles <= 768 and inputs // 8 >= 2 * (64 if 8 < rows <= 64 else 128))
        if tiling.splits > 1:
            assert tiles <= len(scratch.num_done)
            assert tiles * tiling.splits * tiling.rows * tiling.block <= len(scratch.parts)
        assert choose_tiling(rows, words).splits == 1
    if (outputs, inputs) == (1024, 3072):
        assert [choose_add_tiling(rows, words).splits for rows in (8, 16, 64, 256)] == [3, 6, 6, 3]
    assert choose_tiling(8, words, gated=True).slice_words == 32
    found = [choose_tiling(rows, words, shared_bytes=99 * 1024).slice_words for rows in (128, 129)]
    assert found == [32, 16], "a card with less shared memory has the largest tiling in smaller slices"


def test_a_slice_is_within_a_chunk(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemm import choose_add_tiling, choose_tiling

    words, _ = made(device, CASES[0])
    assert words.chunk == 16
    assert choose_tiling(5, words).slice_words == choose_add_tiling(300, words).slice_words == 16
