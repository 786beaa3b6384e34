"""Every network with its layers as Triton kernels against the same network with torch's operators."""

import pathlib

import pytest
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.choice import choose_backend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of
from tests.fakes.tiny_models import FAMILIES, make_model
from tests.fakes.triton_device import triton_device

BLOCK_SIZE = 8


@torch.inference_mode()
def logits_of(folder: pathlib.Path, placement: Placement, query_lens: list[int], contexts: list[int]) -> torch.Tensor:
    """Logits of a step over caches that hold the same numbers in every call."""
    config = read_model_config(folder)
    model = build_model(config, placement, 64)
    load_weights(model, folder)
    kv = KVTensors(config, 12, BLOCK_SIZE, placement)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(3)))
    requests = [PagedRequest([1 + 3 * row, 2 + 3 * row, 3 + 3 * row], context) for row, context in enumerate(contexts)]
    metadata = build_metadata(requests, query_lens, BLOCK_SIZE, placement.device)
    kernels = CpuKernels(config, BLOCK_SIZE, placement)
    backend = choose_backend("auto", config, placement, 16, kernels) if placement.use_triton else TorchNaiveBackend()
    step = backend.begin_step(kv, metadata)
    positions = positions_of(requests, query_lens).to(placement.device)
    ids = torch.arange(sum(query_lens), device=placement.device) * 7 % config.vocab_size
    return model.compute_logits(model.forward(ids, positions, step))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("query_lens, contexts", [([1, 1], [5, 9]), ([1, 6, 12], [17, 0, 10])])
def test_same_logits(tmp_path: pathlib.Path, family: str, query_lens: list[int], contexts: list[int]) -> None:
    device = triton_device()
    folder = make_model(tmp_path / "model", family)
    expected = logits_of(folder, Placement(device, torch.float32), query_lens, contexts)
    actual = logits_of(folder, Placement(device, torch.float32, use_triton=True), query_lens, contexts)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
