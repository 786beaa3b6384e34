"""Products of tens of rows against float64; how they are cut."""

import dataclasses
import itertools
import types

import pytest
import torch
import torch.nn.functional as F

from tests.fakes.int4_weights import relative_error
from tests.fakes.triton_device import half_types

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.kernels.triton.skinny_gemm import (
    SHARED_BYTES,
    SplitScratch,
    Tiling,
    add_skinny_gemm,
    choose_add_tiling,
    choose_tiling,
    runs_on,
    skinny_gemm,
    takes_norm,
)

EPS = 1e-6
TILINGS = {  # each for 96 inputs
    "one turn held": Tiling(8, 16, 128, ways=4, held=True),
    "three turns held": Tiling(8, 32, 32, ways=2, held=True),
    "held, no ways": Tiling(16, 64, 32, held=True),
    "not held": Tiling(32, 64, 32),
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
        part = max(32, 16 * tiling.ways)  # tensor cores take 16 inputs at least
        for cut in (tiling, dataclasses.replace(tiling, part=part, splits=-(-96 // part))):
            actual = residual.clone().to(device)
            add_skinny_gemm(actual, *on_device, scratch, dependent=False, tiling=cut)
            assert relative_error(actual, residual.double() + product) < 5e-3
    assert not bool(scratch.num_done.any())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["one turn held", "three turns held"])
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


@pytest.mark.parametrize("rows", [3, 12, 20])
def test_the_tilings_that_are_chosen(device: torch.device, rows: int) -> None:
    """Sizes that no tile divides; splits that take different numbers of inputs."""
    dtype = half_types(device)[-1]
    for columns in (200, 1100):
        x, weight, norm = (drawn(*shape, dtype=dtype) for shape in ((rows, columns), (70, columns), (columns,)))
        weight *= columns**-0.5
        product = x.double() @ weight.double().t()
        on_device = x.to(device), weight.to(device)
        assert relative_error(skinny_gemm(*on_device, dependent=False), product) < 5e-3
        actual = torch.zeros_like(product).to(device, dtype)
        add_skinny_gemm(actual, *on_device, SplitScratch(device), dependent=False)
        assert relative_error(actual, product) < 5e-3
        gated = rows > 8
        if takes_norm(rows, columns, gated=gated):
            expected = F.rms_norm(x.double(), (columns,), norm.double(), EPS) @ weight.double().t()
            gate, up = expected.chunk(2, 1)
            actual = skinny_gemm(*on_device, norm=(norm.to(device), EPS), gated=gated, dependent=False)
            assert relative_error(actual, F.silu(gate) * up if gated else expected) < 5e-3


SIZES = (70, 576, 1024, 2048, 4096, 6144, 11008)
INPUTS = (64, 576, 896, 1024, 1536, 2048, 3072, 4864, 9728, 11008)


def test_how_products_are_cut() -> None:
    for rows, size, columns in itertools.product((1, 8, 9, 16, 17, 32, 64), SIZES, INPUTS):
        for gated in (False, True):
            tiling = choose_tiling(rows, size, columns, gated=gated)
            assert tiling.splits == 1 and tiling.stages >= 3 and rows <= tiling.rows < max(2 * rows, 9)
            read = tiling.rows + tiling.block * (2 if gated else 1)
            assert 2 * tiling.stages * tiling.part * read < SHARED_BYTES
            if takes_norm(rows, columns, gated=gated):
                tiling = choose_tiling(rows, size, columns, gated=gated, normed=True)
                assert tiling.held and tiling.turns(columns) <= 2


def test_how_inputs_are_split(device: torch.device) -> None:
    scratch = SplitScratch(device)
    for rows, size, columns in itertools.product((1, 8, 9, 16, 17, 32), SIZES, INPUTS):
        tiling = choose_add_tiling(rows, size, columns)
        each = tiling.turns(columns) * tiling.part
        assert (tiling.splits - 1) * each < columns <= tiling.splits * each  # no program has nothing to do
        if tiling.splits > 1:
            tiles = -(-size // tiling.block) * -(-rows // tiling.rows)
            assert tiles <= len(scratch.num_done)
            assert tiles * tiling.splits * tiling.block * tiling.rows <= len(scratch.parts)
    chosen = [choose_add_tiling(rows, 1024, 3072) for rows in (8, 16, 32)]
    assert [(tiling.splits, tiling.held) for tiling in chosen] == [(1, True), (8, True), (8, True)]
    assert choose_add_tiling(8, 4096, 11008).splits == 2 and not choose_add_tiling(8, 4096, 11008).held


def test_more_tiles_than_programs_can_share(device: torch.device) -> None:
    x, weight, residual = (torch.zeros(*shape, dtype=torch.float16) for shape in ((40, 96), (8192, 96), (40, 8192)))
    with pytest.raises(ValueError, match=r"40 rows of 8192 outputs are \(128, 5\) tiles; up to 256 may be split"):
        add_skinny_gemm(residual, x, weight, SplitScratch(device), dependent=False, tiling=Tiling(8, 64, 32, splits=3))


def test_shared_memory_decides_where_it_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_on(torch.device("cpu"))  # the interpreter
    given: list[int] = []

    class Utils:
        @staticmethod
        def get_device_properties(index: int) -> dict[str, int]:
            given.append(index)
            return {"max_shared_mem": 101376 if index else 232448}

    driver = types.SimpleNamespace(active=types.SimpleNamespace(utils=Utils))
    monkeypatch.setattr("triton.runtime.driver", driver)
    assert runs_on(torch.device("cuda", 0)) and not runs_on(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not runs_on(torch.device("cuda")) and given == [0, 1, 1]
