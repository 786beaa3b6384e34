from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers import linear as linear_module
from folovllm.worker_proc.layers.linear import DenseLinears, Linear, can_pack
from folovllm.worker_proc.layers.norm import RMSNorm
from tests.fakes.int4_weights import relative_error
from tests.fakes.triton_device import half_types, triton_device

CPU = torch.device("cpu")


def make(dtype: torch.dtype, *, bias: bool) -> tuple[Linear, dict[str, torch.Tensor]]:
    layer = Linear(48, {"q_proj": 64, "k_proj": 16, "v_proj": 16}, Placement(CPU, dtype), bias=bias)
    parts = dict(layer.checkpoint_tensors("attn."))
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        part.copy_(torch.randn(part.shape, generator=generator))
    return layer, parts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_lie_one_below_the_other_and_packing_changes_no_product(dtype: torch.dtype, bias: bool) -> None:
    layer, parts = make(dtype, bias=bias)
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(parts) == [f"attn.{name}_proj.{kind}" for name in "qkv" for kind in kinds]
    expected_weight = torch.cat([parts[f"attn.{name}_proj.weight"] for name in "qkv"]).float()
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.float() @ expected_weight.t()
    if bias:
        expected += torch.cat([parts[f"attn.{name}_proj.bias"] for name in "qkv"]).float()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    with torch.inference_mode():
        for rows in (1, 2, 16, 37):
            torch.testing.assert_close(layer(x[:rows]).float(), expected[:rows], atol=tolerance, rtol=tolerance)
        layer.pack()
        for rows in (1, 2, 16, 37):
            product = layer(x[:rows])
            assert product.dtype == dtype and product.is_contiguous()
            torch.testing.assert_close(product.float(), expected[:rows], atol=tolerance, rtol=tolerance)


def test_only_bf16_is_packed() -> None:
    assert not can_pack(torch.zeros(16, 16))
    assert not can_pack(torch.zeros(16, 16, dtype=torch.float16))
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert can_pack(torch.zeros(16, 16, dtype=torch.bfloat16)) == supported


def test_a_tied_layer_leaves_the_embedding_as_it_is() -> None:
    embedding = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = embedding.clone()
    layer = Linear.tied(embedding, Placement(CPU, torch.bfloat16))
    assert layer.weight is embedding and list(layer.checkpoint_tensors("")) == []
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        plain = layer(x)
        layer.pack()
        torch.testing.assert_close(layer(x), plain)
    assert torch.equal(embedding, before)


def test_products_with_what_stands_before_and_after_them() -> None:
    placement = Placement(torch.device("cpu"), torch.float32)
    norm, linear = RMSNorm(6, 1e-6, placement), Linear(6, {"gate": 4, "up": 4}, placement)
    norm.weight.uniform_(0.5, 1.5)
    linear.weight.normal_()
    hidden = torch.randn(3, 6)
    product = F.rms_norm(hidden, (6,), norm.weight, 1e-6) @ linear.weight.t()
    torch.testing.assert_close(linear.of_normed(hidden, norm), product)
    torch.testing.assert_close(linear.gated(hidden, norm), F.silu(product[:, :4]) * product[:, 4:])
    total = torch.ones(3, 8)
    linear.add_to(total, hidden)
    torch.testing.assert_close(total, 1 + hidden @ linear.weight.t())


@pytest.mark.parametrize("rows", [1, 2, 12, 33])
def test_products_of_few_rows_on_a_gpu(rows: int) -> None:
    """By GEMV, by skinny products with the norm in them and without, added by torch."""
    device = triton_device()
    for dtype in half_types(device):
        placement = Placement(device, dtype, use_triton=True)
        norm, linears = RMSNorm(32, 1e-6, placement), DenseLinears(placement)
        linear, back = linears("", 32, {"gate": 48, "up": 48}), linears("", 48, {"down": 32})
        norm.weight.uniform_(0.5, 1.5)
        for layer in (linear, back):
            for _, part in layer.checkpoint_tensors(""):
                part.normal_()
        hidden = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).to(device, dtype)
        gate, up, down = (part.cpu().double() for layer in (linear, back) for _, part in layer.checkpoint_tensors(""))
        normed = F.rms_norm(hidden.cpu().double(), (32,), norm.weight.cpu().double(), 1e-6)
        gated = F.silu(normed @ gate.t()) * (normed @ up.t())
        with torch.inference_mode():
            product, activated = linear.of_normed(hidden, norm), linear.gated(hidden, norm)
            total = hidden.clone()
            back.add_to(total, activated)
        assert relative_error(product, normed @ torch.cat((gate, up)).t()) < 5e-3
        assert relative_error(activated, gated) < 1e-2
        assert relative_error(total, hidden.cpu().double() + gated @ down.t()) < 1e-2


def test_which_products_tensor_cores_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither more rows nor larger weights than were found to win, nor float32, nor biases."""
    device = triton_device()
    from folovllm.worker_proc.kernels.triton import skinny_gemm as kernels

    calls: list[str] = []
    for name in ("skinny_gemm", "add_skinny_gemm"):
        original = getattr(kernels, name)

        def counted(*args: Any, original: Callable[..., Any] = original, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(kernels, name, counted)

    def taken(rows: int, dtype: torch.dtype = torch.float16, *, bias: bool = False) -> list[str]:
        calls.clear()
        placement = Placement(device, dtype, use_triton=True)
        norm, layer = RMSNorm(32, 1e-6, placement), DenseLinears(placement)("", 32, {"o": 32}, bias=bias)
        norm.weight.fill_(1)
        for _, part in layer.checkpoint_tensors(""):
            part.normal_()
        with torch.inference_mode():
            hidden = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            layer.of_normed(hidden, norm)
            layer.add_to(hidden, torch.ones_like(hidden))
        return list(calls)

    assert [taken(1), taken(2), taken(32)] == [
        [],
        ["skinny_gemm", "add_skinny_gemm"],
        ["skinny_gemm", "add_skinny_gemm"],
    ]
    assert [taken(33), taken(64), taken(65)] == [["skinny_gemm"], ["skinny_gemm"], []]
    assert taken(2, torch.float32) == [] and taken(2, bias=True) == []
    monkeypatch.setattr(linear_module, "_SKINNY_NUMBERS", 32 * 32 - 1)
    assert taken(2) == []


def test_gpus_with_too_little_shared_memory_leave_products_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device()
    from folovllm.worker_proc.kernels.triton import skinny_gemm as kernels

    monkeypatch.setattr(kernels, "runs_on", lambda _device: False)
    monkeypatch.setattr(kernels, "skinny_gemm", None)
    placement = Placement(device, torch.float16, use_triton=True)
    norm, layer = RMSNorm(32, 1e-6, placement), DenseLinears(placement)("", 32, {"o": 48})
    norm.weight.fill_(1)
    layer.weight.fill_(1)  # type: ignore[attr-defined]
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    with torch.inference_mode():
        product = layer.of_normed(hidden, norm)
    expected = F.rms_norm(hidden.double(), (32,), eps=1e-6).sum(1, keepdim=True).expand(4, 48)
    torch.testing.assert_close(product.double(), expected, atol=2e-2, rtol=1e-2)
