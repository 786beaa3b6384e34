"""Whole tiny models with 4-bit weights in Triton's kernels, against the same numbers unquantized in float32."""

import pathlib
from typing import Any

import pytest
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.registry import linear_maker
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata
from tests.fakes.gptq_models import Format, make_gptq_model
from tests.fakes.triton_device import half_types, triton_device

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.layers import int4_triton_linear
from folovllm.worker_proc.layers.int4_triton_linear import Int4TritonLinear
from folovllm.worker_proc.layers.linear import Linear

IDS = torch.tensor([5, 150, 41])
FORMATS = {
    "symmetric": ("llama", Format()),
    "asymmetric, with biases": ("qwen2", Format(sym=False, group_size=16)),
    "no groups": ("qwen3", Format(group_size=-1, g_idx=False)),
    "a last group that is smaller": ("llama", Format(group_size=64, sym=False, format="gptq_v2")),
    "activation order": ("llama", Format(order="shuffled")),
    "activation orders of their own": ("qwen3", Format(order="own", sym=False)),
}
# For three rows: the borders between kernels, and which of them serves.
KERNELS = {"gemv": (3, 3), "gemm": (1, 3), "expansion": (1, 2)}


@torch.inference_mode()
def logits_of(folder: pathlib.Path, placement: Placement) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt, and the model."""
    config = read_model_config(folder)
    model: CausalLM = build_model(config, placement, 64, linear_maker(config, placement, folder))
    load_weights(model, folder)
    kv = KVTensors(config, 2, 8, placement)
    metadata = build_metadata([PagedRequest([1])], [len(IDS)], 8, placement.device)
    step = TorchNaiveBackend().begin_step(kv, metadata)
    ids, positions = IDS.to(placement.device), torch.arange(len(IDS), device=placement.device)
    return model.compute_logits(model.forward(ids, positions, step)).float().cpu(), model


def check(quantized: pathlib.Path, plain: pathlib.Path) -> None:
    device = triton_device()
    expected, _ = logits_of(plain, Placement(torch.device("cpu"), torch.float32))
    for dtype in half_types(device):
        actual, model = logits_of(quantized, Placement(device, dtype, use_triton=True))
        assert isinstance(model.model.layers[0].mlp.down_proj.layer, Int4TritonLinear)
        assert (actual - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_model_of_every_format(tmp_path: pathlib.Path, name: str) -> None:
    family, form = FORMATS[name]
    check(*make_gptq_model(tmp_path, family, form))


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_model_with_every_kernel(tmp_path: pathlib.Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gemv_rows, gemm_rows = KERNELS[kernel]
    monkeypatch.setattr(int4_triton_linear, "GEMV_ROWS", gemv_rows)
    monkeypatch.setattr(int4_triton_linear, "GEMM_ROWS", gemm_rows)
    check(*make_gptq_model(tmp_path, "qwen2", Format(sym=False, order="shuffled"), head=True, vocab_size=200))


@pytest.mark.parametrize("form", [Format(bits=8), Format(group_size=24)])
def test_what_no_kernel_takes_is_expanded(
    tmp_path: pathlib.Path, form: Format, caplog: pytest.LogCaptureFixture
) -> None:
    device = triton_device()
    quantized, plain = make_gptq_model(tmp_path, "llama", form, hidden_size=96, num_attention_heads=4)
    expected, _ = logits_of(plain, Placement(torch.device("cpu"), torch.float32))
    actual, model = logits_of(quantized, Placement(device, torch.float16, use_triton=True))
    assert isinstance(model.model.layers[0].mlp.down_proj.layer, Linear)
    assert (actual - expected).abs().mean() < 0.02 * expected.std()
    assert ("no kernel takes these" in caplog.text) == (form.bits == 4)  # 8 bits are never kept


def test_float32_is_expanded(tmp_path: pathlib.Path) -> None:
    quantized, plain = make_gptq_model(tmp_path, "llama", Format())
    expected, _ = logits_of(plain, Placement(torch.device("cpu"), torch.float32))
    actual, model = logits_of(quantized, Placement(triton_device(), torch.float32, use_triton=True))
    assert isinstance(model.model.layers[0].mlp.down_proj.layer, Linear)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
