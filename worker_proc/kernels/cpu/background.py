"""Kernels for the CPU are compiled in a thread while the weights are read: a start waits for them hardly at all."""

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from folovllm.common.config import use_cpu_kernels
from folovllm.common.log import get_logger
from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.device import Placement, dtype_name

if TYPE_CHECKING:
    from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape

logger = get_logger(__name__)


def compile_in_background(
    config: ModelConfig, block_size: int, placement: Placement
) -> "Callable[[], DecodeAttention | None]":
    """Begins to compile the attention of decoding requests; what is returned waits for it.

    It gives None where torch's operators do the work: on a GPU, in float32 (which the tests' equalities are about, and
    which a kernel gains least in), for shapes there is no kernel for, without llvmlite or GNU's OpenMP, and where
    $FOLOVLLM_CPU_KERNELS says so.
    """
    if placement.device.type != "cpu" or placement.dtype == torch.float32 or not use_cpu_kernels():
        return lambda: None
    if importlib.util.find_spec("llvmlite") is None:
        logger.info("llvmlite is missing: attention runs with torch's operators, about half as fast")
        return lambda: None
    from folovllm.worker_proc.kernels.cpu.decode_attention import HeadShape

    group = config.num_attention_heads // config.num_key_value_heads
    kind = dtype_name(placement.dtype)
    shape = HeadShape(config.num_key_value_heads, group, config.head_dim, block_size, kind)
    if not shape.is_supported:
        logger.info("attention runs with torch's operators: there is no kernel for %s", shape)
        return lambda: None
    executor = ThreadPoolExecutor(1, thread_name_prefix="compile")
    future = executor.submit(_compile, shape)
    executor.shutdown(wait=False)
    return future.result


def _compile(shape: "HeadShape") -> "DecodeAttention | None":
    from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention
    from folovllm.worker_proc.kernels.cpu.llvm import prepare
    from folovllm.worker_proc.kernels.cpu.team import find_team

    team = find_team()
    if team is None:
        logger.info("this torch does not use GNU's OpenMP: attention runs with torch's operators")
        return None
    prepare()
    try:
        return DecodeAttention(shape, team)
    except RuntimeError:  # LLVM's
        logger.exception("attention runs with torch's operators: its kernel cannot be compiled")
        return None
