"""4-bit products on a GPU against a float64 dequantization, for every kernel that the number of rows may choose."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.quantization.storage import Quantized
from tests.fakes.int4_weights import random_weight, relative_error, to_device
from tests.fakes.triton_device import half_types, triton_device

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.layers import int4_triton_linear
from folovllm.worker_proc.layers.int4_triton_linear import Int4Scratch, Int4TritonLinear, words_linear

ROWS = (1, 3, 5)  # one for each kernel


@pytest.fixture
def placement(monkeypatch: pytest.MonkeyPatch) -> Iterator[Placement]:
    """On the device, with borders that few rows pass, and weights that are expanded in parts."""
    device = triton_device()
    monkeypatch.setattr(int4_triton_linear, "GEMM_ROWS", 4)
    monkeypatch.setattr(int4_triton_linear, "_MOST_EXPANDED", 2500)
    with torch.inference_mode():
        yield Placement(device, half_types(device)[-1], use_triton=True)


def made(weight: Quantized, placement: Placement, bias: torch.Tensor | None = None) -> Int4TritonLinear:
    layer = words_linear(to_device(weight, placement.device), bias, Int4Scratch(placement))
    assert layer is not None
    return layer


def drawn(*shape: int, placement: Placement) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(placement.device, placement.dtype)


@pytest.mark.parametrize("group_size", [16, 32, 48, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shuffled", [False, True])
def test_products_of_every_format(placement: Placement, group_size: int, sym: bool, shuffled: bool) -> None:
    weight = random_weight(40, 96 if group_size == 48 else 128, group_size, sym=sym, shuffled=shuffled)
    inputs, plain = weight.numbers.shape[0], weight.dequantize(torch.float64)
    bias = drawn(40, placement=placement)
    layer = made(weight, placement, bias)
    assert layer.num_bytes == layer.weight.num_bytes
    assert layer.blocked is None and list(layer.checkpoint_tensors("a.")) == []
    for rows in ROWS:
        x = drawn(rows, inputs, placement=placement)
        product = layer(x)
        assert product.dtype == placement.dtype and product.is_contiguous()
        assert relative_error(product, x.cpu().double() @ plain.t() + bias.cpu().double()) < 5e-3


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_what_stands_before_and_after_the_product(placement: Placement, with_bias: bool, shuffled: bool) -> None:
    weight = random_weight(64, 64, 32, sym=False, shuffled=shuffled)
    bias = drawn(64, placement=placement) if with_bias else None
    layer, norm = made(weight, placement, bias), RMSNorm(64, 1e-6, placement)
    norm.weight.copy_(1 + 0.1 * drawn(64, placement=placement))
    plain, added = weight.dequantize(torch.float64), 0.0 if bias is None else bias.cpu().double()
    for rows in ROWS:
        hidden = drawn(rows, 64, placement=placement)
        normed = F.rms_norm(hidden.cpu().float(), (64,), norm.weight.cpu().float(), 1e-6).to(placement.dtype)
        product = normed.double() @ plain.t() + added
        assert relative_error(layer.of_normed(hidden, norm), product) < 5e-3
        gated = F.silu(product[:, :32]) * product[:, 32:]
        assert relative_error(layer.gated(hidden, norm), gated) < 1e-2  # gate and up are rounded in between
        total = torch.ones_like(hidden)
        layer.add_to(total, hidden)
        assert relative_error(total, 1 + hidden.cpu().double() @ plain.t() + added) < 5e-3


def test_inputs_that_lie_apart(placement: Placement) -> None:
    """Attention's output and parts of a step may be views."""
    weight = random_weight(16, 64, 32, sym=True)
    layer, plain = made(weight, placement), weight.dequantize(torch.float64)
    for rows in ROWS:
        x = drawn(rows, 100, placement=placement)[:, 20:84]
        assert relative_error(layer(x), x.cpu().double() @ plain.t()) < 5e-3
        total = torch.zeros(rows, 16, dtype=placement.dtype, device=placement.device)
        layer.add_to(total, x)
        assert relative_error(total, x.cpu().double() @ plain.t()) < 5e-3


def test_layers_share_what_they_are_expanded_into(placement: Placement) -> None:
    scratch, layers = Int4Scratch(placement), []
    weights = [random_weight(48, 64, 16, sym=True), random_weight(24, 128, 32, sym=False)]
    for weight in weights:
        layers.append(words_linear(to_device(weight, placement.device), None, scratch))
    for layer, weight in [*zip(layers, weights, strict=True)] * 2:
        assert layer is not None
        x = drawn(5, weight.numbers.shape[0], placement=placement)
        assert relative_error(layer(x), x.cpu().double() @ weight.dequantize(torch.float64).t()) < 5e-3


def test_what_the_kernels_do_not_take(placement: Placement) -> None:
    odd_groups = random_weight(16, 48, 24, sym=True)
    assert words_linear(to_device(odd_groups, placement.device), None, Int4Scratch(placement)) is None
