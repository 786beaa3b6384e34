"""Which attention backend serves: the one that is asked for, or the fastest there is, and why."""

from typing import Final

import torch

from folovllm.common.errors import ConfigError
from folovllm.common.log import get_logger
from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.flash_attn import FlashAttnBackend, what_is_missing
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import CpuKernels

_FP8_CAPABILITY: Final = (8, 9)  # from which the hardware converts float8_e4m3fn

logger = get_logger(__name__)


def choose_backend(
    name: str, model_config: ModelConfig, placement: Placement, block_size: int, kernels: CpuKernels
) -> AttentionBackend:
    """The attention backend of that name; "auto" takes the fastest there is.

    On CUDA that is Triton's, which decodes from captured steps; without Triton, flash_attn where the package is there
    and can serve. Everywhere else it is `paged`.

    Raises:
        ConfigError: it is asked for by name and cannot run here.
    """
    if placement.fp8_cache:
        name = _name_for_fp8(name, placement)
    if name == "torch_naive":
        return TorchNaiveBackend()
    if name == "triton_paged" and not placement.use_triton:
        raise ConfigError("attention_backend='triton_paged' needs a CUDA device and the package triton")
    if name == "triton_paged" or (name == "auto" and placement.use_triton):
        return _triton(name, model_config, placement)
    if name == "flash_attn" or (name == "auto" and placement.device.type == "cuda"):
        backend = _flash_attn(name, model_config, placement, block_size)
        if backend is not None:
            return backend
    if name == "auto":
        logger.info("attention backend: paged, the fastest there is on %s", placement.device.type)
    return PagedBackend(model_config.num_attention_heads, kernels.attention, kernels.chunks)


def _name_for_fp8(name: str, placement: Placement) -> str:
    """The backend asked for, if it can read an FP8 cache, or the one that "auto" takes."""
    if name not in ("auto", "torch_naive", "triton_paged"):
        raise ConfigError(
            "kv_cache_dtype='fp8' needs attention_backend='triton_paged', or the slow reference 'torch_naive'; not "
            f"{name!r}"
        )
    if name == "auto" and not placement.use_triton:
        logger.warning(
            "attention backend: torch_naive, the only one for an FP8 cache without Triton on CUDA; it is slow"
        )
        return "torch_naive"
    if name != "torch_naive" and placement.use_triton and placement.device.type == "cuda":
        found = torch.cuda.get_device_capability(placement.device)
        if found < _FP8_CAPABILITY:
            raise ConfigError(
                "kv_cache_dtype='fp8' needs a GPU of compute capability 8.9 or newer, or the slow reference, "
                f"attention_backend='torch_naive'; this one has {found[0]}.{found[1]}"
            )
    return name


def _triton(name: str, model_config: ModelConfig, placement: Placement) -> AttentionBackend:
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    if name == "auto":
        logger.info("attention backend: triton_paged, the fastest there is on %s", placement.device.type)
    heads = HeadCounts(model_config.num_attention_heads, model_config.num_key_value_heads, model_config.head_dim)
    return TritonPagedBackend(heads, placement)


def _flash_attn(name: str, model_config: ModelConfig, placement: Placement, block_size: int) -> AttentionBackend | None:
    """None where it is not asked for by name and cannot run."""
    package, missing = what_is_missing(placement, block_size, model_config.head_dim)
    if package is not None and not missing:
        logger.info("attention backend: flash_attn, by the module %s", package.name)
        return FlashAttnBackend(package)
    if name == "flash_attn":
        raise ConfigError(f"attention_backend='flash_attn' needs {', and '.join(missing)}")
    logger.info("attention backend: not flash_attn, which needs %s", ", and ".join(missing))
    return None
