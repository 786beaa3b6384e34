"""4-bit products against a float64 dequantization: every combination, below 5e-3, few rows and many."""

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu import int4
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.team import find_team
from folovllm.worker_proc.layers.int4_linear import Int4Kernels, Int4Linear, packed_linear
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.quantization.storage import Quantized
from tests.fakes.blocked import packs_in_blocks
from tests.fakes.int4_weights import random_weight, relative_error

BFLOAT16 = Placement(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> Int4Kernels:
    team = find_team()
    if team is None or not packs_in_blocks():
        pytest.skip("no products in bfloat16 on this machine")
    prepare()
    return Int4Kernels(team, None)


def made(weight: Quantized, kernels: Int4Kernels, bias: torch.Tensor | None = None) -> Int4Linear:
    layer = packed_linear(weight, bias, kernels)
    assert layer is not None
    return layer


CASES = [
    (48, 64, 16, True, False),
    (48, 64, 16, False, True),
    (200, 96, 64, True, False),  # a smaller last group, outputs that fill no block
    (200, 96, 64, False, False),
    (33, 128, 32, True, True),
    (64, 1024, 1024, False, False),  # one group
    (64, 128, 128, True, False),
]


@pytest.mark.parametrize(("outputs", "inputs", "group_size", "sym", "shuffled"), CASES)
def test_products_are_those_of_the_plain_numbers(
    kernels: Int4Kernels, outputs: int, inputs: int, group_size: int, sym: bool, shuffled: bool
) -> None:
    weight = random_weight(outputs, inputs, group_size, sym=sym, shuffled=shuffled)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).mul_(0.1).bfloat16()
    layer, plain = made(weight, kernels, bias), weight.dequantize(torch.float64)
    assert (layer.blocked is None) == shuffled
    assert layer.num_bytes < 0.8 * plain.numel() + 2000  # 0.5 bytes and scales, whole blocks
    with torch.inference_mode():
        for rows in (1, 2, 3, 7, 8, 9, 40):
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
            product = layer(x)
            assert product.dtype == torch.bfloat16 and product.shape == (rows, outputs)
            assert relative_error(product, x.double() @ plain.t() + bias.double()) < 5e-3


def test_a_row_is_the_same_in_any_company_of_few(kernels: Int4Kernels) -> None:
    layer = made(random_weight(48, 64, 16, sym=False), kernels)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = layer(x)
    for rows in (1, 2, 3, 5):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_what_stands_before_and_after_the_product(kernels: Int4Kernels) -> None:
    weight = random_weight(64, 64, 32, sym=True)
    layer, norm, plain = made(weight, kernels), RMSNorm(64, 1e-6, BFLOAT16), weight.dequantize()
    norm.weight.uniform_(0.5, 1.5)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = F.rms_norm(hidden, (64,), norm.weight, 1e-6).float() @ plain.t()
    assert relative_error(layer.of_normed(hidden, norm), product.double()) < 1e-2
    gated = F.silu(product[:, :32]) * product[:, 32:]
    assert relative_error(layer.gated(hidden, norm), gated.double()) < 2e-2
    total = torch.ones(3, 64, dtype=torch.bfloat16)
    layer.add_to(total, hidden)
    assert relative_error(total, (1 + hidden.float() @ plain.t()).double()) < 5e-3
    layer.pack()
    assert list(layer.checkpoint_tensors("a.")) == []


def test_layers_of_a_shape_share_the_memory_they_are_expanded_into(kernels: Int4Kernels) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [random_weight(48, 64, 16, sym=True), random_weight(48, 64, 32, sym=False)]
    layers = [made(weight, kernels) for weight in weights]
    for layer, weight in [*zip(layers, weights, strict=True)] * 2:
        assert relative_error(layer(x), x.double() @ weight.dequantize(torch.float64).t()) < 5e-3


def test_processors_without_a_register_to_look_numbers_up_in(
    kernels: Int4Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "can_look_up", lambda: False)
    older = Int4Kernels(kernels.team, None)
    weight = random_weight(48, 64, 16, sym=False)
    layer = made(weight, older)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert relative_error(layer(x), x.double() @ weight.dequantize(torch.float64).t()) < 5e-3


def test_what_the_kernels_do_not_take(kernels: Int4Kernels) -> None:
    odd_inputs = random_weight(16, 40, 8, sym=True)
    uneven = random_weight(16, 64, 16, sym=True)
    uneven.groups[0] = 1
    coarse = Quantized(uneven.numbers, uneven.zeros, torch.full((4, 16), 1e-9), torch.arange(64) // 16)
    for weight in (odd_inputs, uneven, coarse):
        assert packed_linear(weight, None, kernels) is None


def test_groups_that_no_input_belongs_to_are_left_to_the_plain_weight(kernels: Int4Kernels) -> None:
    four = random_weight(16, 64, 16, sym=True)
    for groups in (
        torch.ones(64, dtype=torch.int64),  # the first has none
        torch.zeros(64, dtype=torch.int64),  # the last three
        torch.arange(64) // 32,
    ):
        weight = Quantized(four.numbers, four.zeros, four.scales, groups)
        assert packed_linear(weight, None, kernels) is None
