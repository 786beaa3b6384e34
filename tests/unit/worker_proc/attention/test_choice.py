"""Which attention backend is taken, and what is said where the one asked for cannot serve."""

import dataclasses
import logging

import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.worker_proc.attention import choice
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.flash_attn import FlashAttention2, VarlenAttention
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from tests.fakes.attention import model_config
from tests.fakes.flash_attention import flash_attn_varlen_func

CONFIG = model_config(2, 64)
CPU = Placement(torch.device("cpu"), torch.float32)
GPU_WITHOUT_TRITON = Placement(torch.device("cuda"), torch.bfloat16)
FP8_CPU = dataclasses.replace(CPU, fp8_cache=True)
FP8_TRITON = Placement(torch.device("cuda"), torch.bfloat16, use_triton=True, fp8_cache=True)
PACKAGE = FlashAttention2(flash_attn_varlen_func)


def choose(name: str, placement: Placement = CPU, block_size: int = 16) -> AttentionBackend:
    return choice.choose_backend(name, CONFIG, placement, block_size, CpuKernels(CONFIG, block_size, CPU))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package that can be used, but for what a test puts into this list."""
    missing: list[str] = []

    def what_is_missing(*_: object) -> tuple[VarlenAttention | None, list[str]]:
        return PACKAGE, missing

    monkeypatch.setattr(choice, "what_is_missing", what_is_missing)
    return missing


@pytest.mark.parametrize(("name", "taken"), [("auto", "paged"), ("paged", "paged"), ("torch_naive", "torch_naive")])
def test_on_a_cpu(name: str, taken: str) -> None:
    assert choose(name).name == taken


def test_a_backend_of_gpus_is_refused_on_a_cpu_by_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="'triton_paged' needs a CUDA device and the package triton"):
        choose("triton_paged")
    with pytest.raises(ConfigError, match=r"'flash_attn' needs a CUDA device \(this is cpu\), and .*dtype bfloat16"):
        choose("flash_attn")


def test_without_triton_a_gpu_takes_flash_attn_where_it_fits(
    found: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose("auto", GPU_WITHOUT_TRITON).name == "flash_attn"
        found.append("a block_size that is a multiple of 256 (it is 16)")
        assert choose("auto", GPU_WITHOUT_TRITON).name == "paged"
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: flash_attn, by the module flash_attn",
        "attention backend: not flash_attn, which needs a block_size that is a multiple of 256 (it is 16)",
        "attention backend: paged, the fastest there is on cuda",
    ]


def test_asked_for_by_name_it_serves_or_says_why_not(found: list[str]) -> None:
    assert choose("flash_attn", GPU_WITHOUT_TRITON).name == "flash_attn"
    found.extend(["one thing", "another"])
    with pytest.raises(ConfigError, match="attention_backend='flash_attn' needs one thing, and another"):
        choose("flash_attn", GPU_WITHOUT_TRITON)


def test_triton_comes_before_it(found: list[str], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    with caplog.at_level(logging.INFO):
        placement = Placement(torch.device("cpu"), torch.bfloat16, use_triton=True)
        assert choose("auto", placement).name == "triton_paged"
    assert caplog.records[0].getMessage() == "attention backend: triton_paged, the fastest there is on cpu"


def test_an_fp8_cache_is_read_by_the_reference_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert choose("auto", FP8_CPU).name == "torch_naive"
    assert "torch_naive, the only one for an FP8 cache without Triton on CUDA; it is slow" in caplog.text
    assert choose("torch_naive", FP8_CPU).name == "torch_naive"


@pytest.mark.parametrize("name", ["paged", "flash_attn"])
def test_backends_that_cannot_read_an_fp8_cache_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"needs attention_backend='triton_paged', or the slow .*not '{name}'"):
        choose(name, FP8_CPU)
    with pytest.raises(ConfigError, match="'triton_paged' needs a CUDA device and the package triton"):
        choose("triton_paged", FP8_CPU)


@pytest.mark.parametrize("name", ["auto", "triton_paged"])
def test_a_gpu_without_fp8_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    with pytest.raises(ConfigError, match=r"compute capability 8.9 or newer, .*this one has 8\.6"):
        choose(name, FP8_TRITON)
    assert choose("torch_naive", FP8_TRITON).name == "torch_naive"
