"""Attention with the FlashAttention packages: one call for all tokens of a step, prompts' chunks and decodes alike.

Two packages are known, by the modules that they install:

* `flash_attn_interface`, FlashAttention 3 built from its repository: `flash_attn_with_kvcache` with `page_table`, for
  blocks of any size.
* `flash_attn`, FlashAttention 2: `flash_attn_varlen_func` with `block_table`, for blocks of a multiple of 256 tokens.

Both are CUDA alone, 16-bit, heads of up to 256 numbers, and read the cache where it lies: a block is
[block_size, Hkv, head_dim] to them, whatever its strides. The wheel `fa3-fwd` is of no use here: its kernels are built
without a paged cache.

Queries of a request are its last positions ("bottom right" alignment of the causal mask), which both packages and this
interface mean alike. The K and V of a step's tokens are written by torch before.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.device import Placement, dtype_name
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.kv_tensors import KVTensors

_BLOCK_MULTIPLE: Final = 256  # of FlashAttention 2's blocks
_MOST_HEAD_DIM: Final = 256
_OLDEST_CAPABILITY: Final = (8, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class VarlenStep:
    """What the packages are told of a step of R requests. Integers are int32 on the device.

    Attributes:
        query_ends: [R + 1]; 0, then where each request's queries end.
        key_ends: [R + 1]; 0, then where its keys would end if they lay one after another.
        seq_lens: [R]; its keys.
        block_table: [R, blocks].
        max_query_len, max_seq_len: the largest, on the host.
        scale: of the scores.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int
    scale: float


class VarlenAttention(Protocol):
    """One of the packages."""

    name: str
    block_multiple: int

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: VarlenStep) -> torch.Tensor:
        """[T, Hq, D] and the cache's [blocks, block_size, Hkv, D] → [T, Hq, D]."""
        ...


class FlashAttention2:
    """The package flash-attn; `function` is its `flash_attn_varlen_func`."""

    name = "flash_attn"
    block_multiple = _BLOCK_MULTIPLE

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: VarlenStep) -> torch.Tensor:
        return self._function(
            query,
            keys,
            values,
            cu_seqlens_q=step.query_ends,
            cu_seqlens_k=step.key_ends,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            softmax_scale=step.scale,
            causal=True,
            block_table=step.block_table,
        )


class FlashAttention3:
    """FlashAttention 3's own module; `function` is its `flash_attn_with_kvcache`."""

    name = "flash_attn_interface"
    block_multiple = 1

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: VarlenStep) -> torch.Tensor:
        return self._function(
            query,
            keys,
            values,
            cache_seqlens=step.seq_lens,
            page_table=step.block_table,
            cu_seqlens_q=step.query_ends,
            max_seqlen_q=step.max_query_len,
            softmax_scale=step.scale,
            causal=True,
        )


_PACKAGES: Final[tuple[tuple[str, str, Callable[[Callable[..., torch.Tensor]], VarlenAttention]], ...]] = (
    ("flash_attn_interface", "flash_attn_with_kvcache", FlashAttention3),
    ("flash_attn", "flash_attn_varlen_func", FlashAttention2),
)


def find_package() -> tuple[VarlenAttention | None, str]:
    """The package that is installed, the newer one first, or None and why there is none."""
    causes = []
    for module, function, wrapper in _PACKAGES:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            return wrapper(vars(importlib.import_module(module))[function]), ""
        except ImportError as error:  # such as kernels that were built for another torch
            causes.append(f"{module} is installed and cannot be imported: {error}")
        except KeyError:
            causes.append(f"{module} is installed and has no {function}")
    return None, "; ".join(causes) or "neither module flash_attn nor flash_attn_interface is installed"


def what_is_missing(placement: Placement, block_size: int, head_dim: int) -> tuple[VarlenAttention | None, list[str]]:
    """The package, and what keeps it from being used, in words; there is one where nothing does."""
    package, cause = find_package()
    missing = []
    if placement.device.type != "cuda":
        missing.append(f"a CUDA device (this is {placement.device.type})")
    elif torch.cuda.get_device_capability(placement.device) < _OLDEST_CAPABILITY:
        missing.append("a GPU of compute capability 8.0 or newer")
    if package is None:
        missing.append(f"the package flash-attn ({cause})")
    elif block_size % package.block_multiple:
        missing.append(f"a block_size that is a multiple of {package.block_multiple} (it is {block_size})")
    if placement.dtype == torch.float32:
        missing.append(f"dtype bfloat16 or float16 (it is {dtype_name(placement.dtype)})")
    if head_dim > _MOST_HEAD_DIM:
        missing.append(f"heads of at most {_MOST_HEAD_DIM} numbers (they have {head_dim})")
    return package, missing


class FlashAttnBackend:
    """See the module's head."""

    name = "flash_attn"

    def __init__(self, package: VarlenAttention) -> None:
        self._package = package

    def begin_step(self, kv: KVTensors, metadata: AttentionMetadata) -> "FlashAttnStep":
        ends = [[0, *itertools.accumulate(lens)] for lens in (metadata.query_lens, metadata.seq_lens)]
        query_ends, key_ends = upload(np.array(ends, np.int32), metadata.block_table.device)
        step = VarlenStep(
            query_ends=query_ends,
            key_ends=key_ends,
            seq_lens=metadata.seq_lens_device.to(torch.int32),
            block_table=metadata.block_table.to(torch.int32),
            max_query_len=max(metadata.query_lens),
            max_seq_len=max(metadata.seq_lens),
            scale=1 / math.sqrt(kv.head_dim),
        )
        return FlashAttnStep(self._package, kv, step, kv.token_row_ids(metadata.slot_mapping))


class FlashAttnStep:
    """See `backend.AttentionStep`."""

    def __init__(self, package: VarlenAttention, kv: KVTensors, step: VarlenStep, write_rows: torch.Tensor) -> None:
        self._package = package
        self._kv = kv
        self._step = step
        self._write_rows = write_rows

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        kv = self._kv
        kv.token_rows(layer).index_copy_(0, self._write_rows, key_and_value.reshape(-1, kv.head_dim))
        keys, values = kv.layer(layer).permute(0, 2, 3, 1, 4)  # [blocks, block_size, Hkv, D] each; no copy
        return self._package.attend(query, keys, values, self._step).flatten(1)
