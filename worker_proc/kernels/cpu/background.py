"""Kernels for the CPU are compiled in a thread beside everything else: nothing waits for them.

Until a kernel is there torch's operators serve. Compiled code is kept on disk, so from the second start on it is there
before the first step.
"""

import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from folovllm.common.config import cache_dir, use_cpu_kernels
from folovllm.common.errors import ConfigError
from folovllm.common.log import get_logger
from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.device import Placement, dtype_name
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.parts import NetworkParts

if TYPE_CHECKING:
    from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention
    from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape
    from folovllm.worker_proc.kernels.cpu.network import CompiledNetwork
    from folovllm.worker_proc.kernels.cpu.team import Team

T = TypeVar("T")

logger = get_logger(__name__)


class Later(Generic[T]):
    """Something that is being made; called, it gives it, or None as long as it is not there, or if it cannot be."""

    def __init__(self, future: "Future[T | None]") -> None:
        self._future = future

    def __call__(self) -> T | None:
        return self._future.result() if self._future.done() else None

    @property
    def is_known(self) -> bool:
        """Whether it has been made, or is known not to be."""
        return self._future.done()

    def wait(self) -> T | None:
        """The same once it is known."""
        return self._future.result()

    @classmethod
    def never(cls) -> "Later[T]":
        """What is not made at all."""
        future: Future[T | None] = Future()
        future.set_result(None)
        return cls(future)


class Compiler:
    """A thread that compiles one thing after another; it ends once there is nothing left to do."""

    def __init__(self) -> None:
        self.cache = CodeCache(cache_dir() / "kernels")

    def begin(self, what: str, make: Callable[["Team"], T | None]) -> Later[T]:
        """Begins `make`, whose failures are logged: torch's operators go on."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="compile")
        future = executor.submit(lambda: _make(what, make))
        executor.shutdown(wait=False)
        return Later(future)


def _make(what: str, make: Callable[["Team"], T | None]) -> T | None:
    began = time.perf_counter()
    try:
        from folovllm.worker_proc.kernels.cpu.compiled import prepare
        from folovllm.worker_proc.kernels.cpu.team import find_team

        team = find_team()
        if team is None:
            logger.info("this torch does not use GNU's OpenMP: %s runs with torch's operators", what)
            return None
        prepare()
        made = make(team)
    except Exception:  # LLVM's, the loader's, a full disk's: kernels only make faster what torch computes as well
        logger.exception("%s runs with torch's operators: its kernel cannot be compiled", what)
        return None
    logger.debug("%s: kernels ready after %.2f s", what, time.perf_counter() - began)
    return made


class CpuKernels:
    """The kernels of one worker; none where torch's operators do the work.

    That is on a GPU, in float32 (which the tests' equalities are about, and which a kernel gains least in), for shapes
    there is no kernel for, without llvmlite or GNU's OpenMP, and where $FOLOVLLM_CPU_KERNELS says so.

    Attributes:
        attention: of decoding requests; its compilation begins with this object.
        chunks: attention of prompt chunks; the same.
        cache: where compiled code is kept.
        batch_invariant: see `device.Placement`.
    """

    def __init__(self, config: ModelConfig, block_size: int, placement: Placement) -> None:
        self.attention: Later[DecodeAttention] = Later.never()
        self.chunks: Later[ChunkAttention] = Later.never()
        self.batch_invariant = placement.batch_invariant
        self._num_q_heads = config.num_attention_heads
        self._compiler = Compiler()
        self.cache = self._compiler.cache
        if placement.device.type == "cpu" and placement.dtype != torch.float32 and use_cpu_kernels():
            self._begin_attention(config, block_size, dtype_name(placement.dtype))

    def _begin_attention(self, config: ModelConfig, block_size: int, kind: str) -> None:
        if importlib.util.find_spec("llvmlite") is None:
            logger.info("llvmlite is missing: everything runs with torch's operators, about half as fast")
            return
        from folovllm.worker_proc.kernels.cpu.decode_attention import HeadShape

        group = config.num_attention_heads // config.num_key_value_heads
        shape = HeadShape(config.num_key_value_heads, group, config.head_dim, block_size, kind)
        if not shape.is_supported:
            logger.info("attention runs with torch's operators: there is no kernel for %s", shape)
            return
        cache = self._compiler.cache
        self.attention = self._compiler.begin("attention", lambda team: _attention(shape, team, cache))
        self.chunks = self._compiler.begin("attention of prompts", lambda team: _chunks(shape, team, cache))

    def require(self) -> None:
        """Waits for the attention's kernels.

        Raises:
            ConfigError: there are none for this model, or none may be used.
        """
        if self.attention.wait() is None or self.chunks.wait() is None:
            raise ConfigError(
                "batch_invariant needs the compiled attention kernels; there are none for this model here"
            )

    def begin_network(self, parts: NetworkParts, kv: KVTensors) -> "Later[CompiledNetwork]":
        """Whole steps; for a network whose weights are in place."""
        if self.attention() is None and self.attention.is_known:
            return Later.never()
        return self._compiler.begin("a whole step", lambda team: self._network(parts, kv, team))

    def _network(self, parts: NetworkParts, kv: KVTensors, team: "Team") -> "CompiledNetwork | None":
        from folovllm.worker_proc.kernels.cpu.network import CompiledNetwork, plan_network

        attention = self.attention.wait()
        plan = plan_network(parts, kv, self._num_q_heads)
        if plan is None:
            logger.info("steps run with torch's operators: there is no kernel for these weights")
        if attention is None or plan is None:
            return None
        return CompiledNetwork(plan, attention, self.chunks.wait(), kv, team, self._compiler.cache)


def _attention(shape: "HeadShape", team: "Team", cache: CodeCache) -> "DecodeAttention":
    from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention

    return DecodeAttention(shape, team, cache)


def _chunks(shape: "HeadShape", team: "Team", cache: CodeCache) -> "ChunkAttention":
    from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention

    return ChunkAttention(shape, team, cache)
