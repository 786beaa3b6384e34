"""Where kernels are compiled, and where torch's operators do the work; the backend gives the same either way."""

import logging
import threading

import msgspec
import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.common.model_config import ModelConfig, read_model_config
from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import Compiler, CpuKernels, Later
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.weights import fill_dummy_weights
from tests.fakes.tiny_models import make_model

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

CPU = torch.device("cpu")
BFLOAT16 = Placement(CPU, torch.bfloat16)
BOUND_S = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    tiny = read_model_config(make_model(tmp_path_factory.mktemp("model") / "tiny", "qwen3"))
    return msgspec.structs.replace(tiny, head_dim=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_for_sixteen_bits(config: ModelConfig, dtype: torch.dtype) -> None:
    kernels = CpuKernels(config, 16, Placement(CPU, dtype))
    for kernel in (kernels.attention.wait(), kernels.chunks.wait()):
        assert kernel is not None
        assert kernel.shape.head_dim == 64


def test_none_for_float32_or_shapes_without_one(config: ModelConfig) -> None:
    for block_size, placement in ((16, Placement(CPU, torch.float32)), (8, BFLOAT16)):
        kernels = CpuKernels(config, block_size, placement)
        assert kernels.attention.is_known and kernels.attention() is None
        assert kernels.chunks.is_known and kernels.chunks() is None
        model = build_model(config, placement, 64)
        steps = kernels.begin_network(model.parts(), KVTensors(config, 2, block_size, placement))
        assert steps.is_known and steps() is None


def test_none_if_the_user_says_so(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CPU_KERNELS", "torch")
    assert CpuKernels(config, 16, BFLOAT16).attention.wait() is None
    monkeypatch.setenv("FOLOVLLM_CPU_KERNELS", "fast")
    with pytest.raises(ConfigError, match="FOLOVLLM_CPU_KERNELS='fast'"):
        CpuKernels(config, 16, BFLOAT16)


def test_nobody_waits_for_what_is_not_there_yet() -> None:
    go_on = threading.Event()

    def make(_team: object) -> str:
        assert go_on.wait(BOUND_S)
        return "made"

    later = Compiler().begin("something", make)
    before = later(), later.is_known
    go_on.set()
    assert before == (None, False)
    assert later.wait() == "made" and later() == "made" and later.is_known
    never: Later[str] = Later.never()
    assert never.is_known and never() is None and never.wait() is None


@pytest.mark.parametrize("kind", [RuntimeError, OSError, AssertionError])
def test_what_cannot_be_compiled_is_logged_and_torch_goes_on(
    caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    def make(_team: object) -> str:
        raise kind("LLVM says no")

    with caplog.at_level(logging.ERROR, logger="folovllm"):
        assert Compiler().begin("something", make).wait() is None
    assert "something runs with torch's operators" in caplog.text and "LLVM says no" in caplog.text


def test_a_network_whose_weights_are_not_packed_goes_on_with_torch(
    config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    placement = Placement(CPU, torch.float16)  # which nothing packs
    kernels = CpuKernels(config, 16, placement)
    model = build_model(config, placement, 64)
    fill_dummy_weights(model, 0)
    with caplog.at_level(logging.INFO, logger="folovllm"):
        assert kernels.begin_network(model.parts(), KVTensors(config, 2, 16, placement)).wait() is None
    assert "no kernel for these weights" in caplog.text


def test_the_backend_gives_the_same_with_it_and_without(config: ModelConfig) -> None:
    torch.manual_seed(0)
    kernel = CpuKernels(config, 16, BFLOAT16).attention
    assert kernel.wait() is not None
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    lens, chunk = [1, 16, 40], 5
    total = len(lens) + chunk
    table = torch.arange(1, 17).view(4, 4)
    seq_lens = [*lens, 21]
    positions = [length - 1 for length in lens] + list(range(21 - chunk, 21))
    rows = [0, 1, 2] + [3] * chunk
    mapping = [int(table[row, at // 16]) * 16 + at % 16 for row, at in zip(rows, positions, strict=True)]
    metadata = AttentionMetadata([1, 1, 1, chunk], seq_lens, 3, table, torch.tensor(mapping), torch.tensor(seq_lens))
    query = torch.randn(total, heads, dim, dtype=torch.bfloat16)
    new = torch.randn(total, 2 * kv_heads, dim, dtype=torch.bfloat16)
    outputs = []
    for backend in (PagedBackend(heads), PagedBackend(heads, kernel)):
        kv = KVTensors(config, 20, 16, BFLOAT16)
        torch.manual_seed(1)
        kv.data[:, :, :, 1:] = torch.randn_like(kv.data[:, :, :, 1:])
        outputs.append(backend.begin_step(kv, metadata).attend(0, query, new).float())
        decodes = AttentionMetadata([1, 1, 1], lens, 3, table[:3], torch.tensor(mapping[:3]), torch.tensor(lens))
        outputs.append(backend.begin_step(kv, decodes).attend(0, query[:3], new[:3]).float())
    for without, with_kernel in zip(outputs[:2], outputs[2:], strict=True):
        assert (without - with_kernel).norm() / without.norm() < 1e-2
