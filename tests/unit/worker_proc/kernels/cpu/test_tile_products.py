"""Products of many rows with a unit of a weight, in every form that this processor has, against float64."""

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

import llvmlite.binding as llvm

from folovllm.worker_proc.kernels.cpu.chunk_attention import allow_tiles
from folovllm.worker_proc.kernels.cpu.chunk_products import Form
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.gemv import ProductShape
from folovllm.worker_proc.kernels.cpu.network import WideHead
from folovllm.worker_proc.kernels.cpu.team import Team, find_team
from folovllm.worker_proc.kernels.cpu.tile_products import TILE, UNIT, expanded_bytes, takes
from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout
from folovllm.worker_proc.layers.int4_layout import Int4Layout
from folovllm.worker_proc.layers.int4_linear import pack_blocks
from tests.fakes.blocked import pack_by_hand

ROWS = [1, 15, 16, 17, 32, 33, 48, 65]  # a tile and less, two, two and one, two pairs and one
FEATURES = {Form.AMX: "amx-bf16", Form.PAIRS: "avx512bf16"}


@pytest.fixture(scope="module", params=list(FEATURES))
def form(request: pytest.FixtureRequest) -> Form:
    form: Form = request.param
    if not llvm.get_host_cpu_features().get(FEATURES[form]) or (form is Form.AMX and not allow_tiles()):
        pytest.skip(f"this processor has no {FEATURES[form]}")
    return form


@pytest.fixture(scope="module")
def team() -> Team:
    found = find_team()
    if found is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    prepare()
    return found


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("outputs", "inputs", "width", "has_bias"), [(90, 64, 32, False), (160, 96, 64, True)])
def test_all_rows_of_all_units(form: Form, team: Team, outputs: int, inputs: int, width: int, has_bias: bool) -> None:
    weight, bias = numbers(outputs, inputs), numbers(outputs) if has_bias else None
    blocked, memory = pack_by_hand(weight, width, 2)
    product = WideHead(blocked, bias, form, team, None)
    everything = numbers(max(ROWS), inputs)
    together = product(everything)
    for rows in ROWS:
        found = product(everything[:rows])
        assert found.shape == (rows, outputs)
        assert error(found, everything[:rows], weight, bias) < 1e-6
        assert torch.equal(found, together[:rows])
    assert memory.numel() >= weight.numel()


def test_what_a_row_holds_does_not_reach_the_others(form: Form, team: Team) -> None:
    blocked, memory = pack_by_hand(numbers(64, 32), 32, 2)
    product, x = WideHead(blocked, None, form, team, None), numbers(20, 32)
    expected = product(x).clone()
    x[7, 3] = float("nan")
    found = product(x)
    assert found[7].isnan().all() and torch.equal(found[torch.arange(20) != 7], expected[torch.arange(20) != 7])
    assert not memory.isnan().any()


@pytest.mark.parametrize("layout", [Int4Layout(32, asymmetric=False), Int4Layout(16, asymmetric=True)])
def test_4_bit_weights_are_expanded_on_the_way(form: Form, team: Team, layout: Int4Layout) -> None:
    inputs, outputs = 96, 64
    generator = torch.Generator().manual_seed(0)
    groups = inputs // layout.group_size
    fields = torch.randint(0, 16, (inputs, outputs), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(5, 11, (groups, outputs), dtype=torch.uint8, generator=generator)
    zeros = zeros if layout.asymmetric else torch.full_like(zeros, 8)
    scales = torch.rand(groups, outputs, generator=generator).half().float()
    blocks, blocked = pack_blocks(fields, zeros, scales, layout)
    spread = torch.arange(inputs) // layout.group_size
    weight = ((fields.float() - zeros.float()[spread]) * scales[spread]).T
    product = WideHead(blocked, None, form, team, None)
    for rows in (5, 40):
        x = numbers(rows, inputs)
        assert error(product(x), x, weight, None) < 3e-3  # weights are rounded to bf16
    assert blocks.dtype == torch.uint8


def shape(outputs: int, inputs: int, padded: int, layout: BlockLayout | Int4Layout) -> ProductShape:
    return ProductShape.of(BlockedWeight(0, outputs, inputs, padded, layout))


def test_weights_of_whole_units_and_steps_are_taken() -> None:
    plain = BlockLayout(32, 2, "bfloat16")
    assert takes(shape(64, 96, 96, plain)) and takes(shape(64, 96, 96, Int4Layout(32, asymmetric=False)))
    assert takes(shape(80, 96, 96, plain))  # the last block is filled up with zeros
    assert not takes(shape(80, 96, 96, Int4Layout(32, asymmetric=False)))
    assert not takes(shape(64, 80, 96, plain))
    assert not takes(shape(64, 96, 96, BlockLayout(32, 1, "bfloat16")))
    assert not takes(shape(64, 96, 96, BlockLayout(32, 2, "float16")))
    assert not takes(shape(96, 96, 96, BlockLayout(48, 2, "bfloat16")))


def test_only_4_bit_weights_need_memory_to_be_expanded_in() -> None:
    assert expanded_bytes(shape(64, 96, 96, BlockLayout(32, 2, "bfloat16"))) == 0
    assert expanded_bytes(shape(64, 96, 96, Int4Layout(32, asymmetric=False))) == 96 * UNIT * 2
    assert UNIT == 2 * TILE
