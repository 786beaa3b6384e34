"""Products of tens of rows against float64; how they are cut."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.fakes.int4_weights import relative_error
from tests.fakes.triton_device import half_types

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.kernels.triton.skinny_gemm import (
    SplitScratch,
    Tiling,
    add_skinny_gemm,
    choose_tiling,
    skinny_gemm,
    takes_norm,
)

EPS = 1e-6
TILINGS = {  # each for 96 inputs
    "one turn": Tiling(8, 16, 128, ways=4, held=1, num_warps=8),
    "all turns held": Tiling(8, 32, 32, ways=2, held=3),
    "one of three turns held": Tiling(16, 16, 32, ways=2, held=1),
    "no ways, no turn held": Tiling(8, 64, 32),
    "no ways, a turn held": Tiling(32, 32, 64, held=1),
}


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("rows", [1, 9, 33])
@pytest.mark.parametrize("name", list(TILINGS))
def test_products_of_every_tiling(device: torch.device, name: str, rows: int) -> None:
    tiling = TILINGS[name]
    scratch = SplitScratch(device)
    for dtype in half_types(device):
        x, weight, residual = (drawn(*shape, dtype=dtype) for shape in ((rows, 96), (88, 96), (rows, 88)))
        product, on_device = x.double() @ weight.double().t(), (x.to(device), weight.to(device))
        actual = skinny_gemm(*on_device, dependent=False, tiling=tiling)
        assert actual.dtype == dtype and relative_error(actual, product) < 5e-3
        gate, up = product.chunk(2, 1)
        actual = skinny_gemm(*on_device, gated=True, dependent=False, tiling=tiling)
        assert relative_error(actual, F.silu(gate) * up) < 5e-3
        for splits in (1, 3):
            cut = dataclasses.replace(tiling, part=min(tiling.part, 32) if splits > 1 else tiling.part, splits=splits)
            actual = residual.clone().to(device)
            add_skinny_gemm(actual, *on_device, scratch, dependent=False, tiling=cut)
            assert relative_error(actual, residual.double() + product) < 5e-3
    assert not bool(scratch.num_done.any())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["one turn", "all turns held"])
def test_the_norm_before_a_product(device: torch.device, name: str, gated: bool) -> None:
    for dtype in half_types(device):
        x, norm, weight = (drawn(*shape, dtype=dtype) for shape in ((11, 96), (96,), (80, 96)))
        normed = F.rms_norm(x.double(), (96,), norm.double(), EPS)
        product = normed @ weight.double().t()
        gate, up = product.chunk(2, 1)
        actual = skinny_gemm(
            x.to(device),
            weight.to(device),
            norm=(norm.to(device), EPS),
            gated=gated,
            dependent=False,
            tiling=TILINGS[name],
        )
        assert relative_error(actual, F.silu(gate) * up if gated else product) < 5e-3


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    dtype = half_types(device)[-1]
    x, weight = drawn(8, 96, dtype=dtype).to(device), drawn(64, 96, dtype=dtype).to(device)
    whole = skinny_gemm(x, weight, dependent=False)
    for rows in (1, 3):
        assert torch.equal(skinny_gemm(x[:rows], weight, dependent=False), whole[:rows])


@pytest.mark.parametrize("rows", [3, 20])
def test_the_tilings_that_are_chosen(device: torch.device, rows: int) -> None:
    """Sizes that no tile divides."""
    dtype = half_types(device)[-1]
    x, weight, norm = (drawn(*shape, dtype=dtype) for shape in ((rows, 200), (70, 200), (200,)))
    product = x.double() @ weight.double().t()
    on_device = x.to(device), weight.to(device)
    assert relative_error(skinny_gemm(*on_device, dependent=False), product) < 5e-3
    actual = torch.zeros_like(product).to(device, dtype)
    add_skinny_gemm(actual, *on_device, SplitScratch(device), dependent=False)
    assert relative_error(actual, product) < 5e-3
    if takes_norm(rows, 200):
        expected = F.rms_norm(x.double(), (200,), norm.double(), EPS) @ weight.double().t()
        actual = skinny_gemm(*on_device, norm=(norm.to(device), EPS), dependent=False)
        assert relative_error(actual, expected) < 5e-3


def test_how_products_are_cut(device: torch.device) -> None:
    scratch = SplitScratch(device)
    sizes, inputs = (70, 1024, 4096, 6144, 151936), (64, 896, 1024, 2048, 3072, 4864, 9728)
    for rows, size, columns in itertools.product((1, 8, 9, 16, 17, 32, 64), sizes, inputs):
        for gated in (False, True):
            for normed in {False, takes_norm(rows, columns)}:
                tiling = choose_tiling(rows, size, columns, gated=gated, normed=normed)
                assert tiling.splits == 1
                assert not normed or tiling.held == tiling.turns(columns)
        tiling = choose_tiling(rows, size, columns, may_split=True)
        turns = -(-columns // tiling.part)
        assert turns % tiling.splits == 0
        if tiling.splits > 1:
            tiles = -(-size // tiling.block) * -(-rows // tiling.rows)
            assert tiles <= len(scratch.num_done)
            assert tiles * tiling.splits * tiling.block * tiling.rows <= len(scratch.parts)
    assert [choose_tiling(rows, 1024, 3072, may_split=True).splits for rows in (1, 16, 32)] == [3, 3, 8]
