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


def test_inputs_are_split_where_there_are_few_tiles_and_the_scratch_suffices(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.int4_gemm import SplitScratch, choose_tiling

    words, _ = made(device, CASES[3])
    scratch = SplitScratch(device)
    for rows in range(1, 300, 3):
        for size in (32, 576, 1024, 2048, 4096):
            tiling = choose_tiling(rows, size, words, may_split=True)
            tiles = -(-rows // tiling.rows) * -(-size // tiling.block)
            assert words.words.shape[1] % (tiling.splits * tiling.slice_words) == 0
            assert (tiling.splits > 1) == (tiles < 128)
            if tiling.splits > 1:
                assert tiles <= len(scratch.num_done)
                assert tiles * tiling.splits * tiling.rows * tiling.block <= len(scratch.parts)
            assert choose_tiling(rows, size, words).splits == 1
    assert [choose_tiling(rows, 1024, words, may_split=True).splits for rows in (1, 16, 32, 256)] == [4, 2, 4, 2]
    assert choose_tiling(8, 3072, words, gated=True).slice_words == 16
