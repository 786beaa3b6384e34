"""Writes the K and V of a chunk's tokens to the cache. Reference: the first lines of `TorchNaiveStep.attend`."""

import dataclasses

import torch
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer's cache.

    Attributes:
        data: [2, Hkv, blocks, block_size, head_dim], contiguous.
        scales: float32 [2, Hkv], contiguous, where `data` is float8_e4m3fn; else None.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For kernels, which do not look at the scales where there are none."""
        return self.data, self.data if self.scales is None else self.scales


def write_to_cache(
    key_and_value: torch.Tensor, cache: CacheLayer, slot_mapping: torch.Tensor, first_token: int
) -> None:
    """Writes the tokens from `first_token` on.

    Args:
        key_and_value: [T, 2 · Hkv, head_dim], all K heads, then all V heads; a head is contiguous.
        cache: of the layer.
        slot_mapping: int64 [T]: block id · block_size + place in the block; below 0: the token is not written.
        first_token: tokens before it are not written.
    """
    num_tokens, heads, head_dim = key_and_value.shape
    _, _, num_blocks, block_size, _ = cache.data.shape
    _write_to_cache[(num_tokens - first_token,)](
        key_and_value,
        *cache.pointers,
        slot_mapping,
        first_token,
        key_and_value.stride(0),
        num_blocks * block_size * head_dim,
        heads,
        triton.next_power_of_2(heads),
        head_dim,
        triton.next_power_of_2(head_dim),
        cache.scales is not None,
        num_warps=4,
    )


@triton.jit
def _write_to_cache(
    new_ptr,
    kv_ptr,
    scales_ptr,
    slots_ptr,
    first_token,
    new_stride,
    head_stride,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    FP8: tl.constexpr,
):
    token = first_token + tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head, column = tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED)
    inside = (head < HEADS)[:, None] & (column < tl.where(slot >= 0, HEAD_DIM, 0))[None, :]
    new = tl.load(new_ptr + token * new_stride + head[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
    if FP8:
        scale = tl.load(scales_ptr + head, mask=head < HEADS, other=1.0)
        new = round_to_fp8(new.to(tl.float32) / scale[:, None])
    # K heads, then V heads: the cache has them in the same order, one stride apart.
    at = kv_ptr + head[:, None].to(tl.int64) * head_stride + slot * HEAD_DIM + column[None, :]
    tl.store(at, new.to(kv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_to_fp8(x):
    """float32 → the nearest number (ties to even) that float8_e4m3fn has, still float32.

    The conversion after it is exact then, whoever does it: Triton's interpreter cuts off bits instead of rounding.
    """
    x = tl.minimum(tl.maximum(x, -448.0, propagate_nan=tl.PropagateNan.ALL), 448.0, propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 bits of the mantissa
    subnormal = (x + 24576.0) - 24576.0  # a float32 of that size has steps of 2⁻⁹, as numbers below 2⁻⁶ have here
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def for_products(query, FP8: tl.constexpr):
    """Queries of the type that they and what is read from the cache are multiplied in: their own, or float16 for FP8.

    float16 has every number of float8_e4m3fn, and on Hopper one instruction makes two of them; bfloat16 takes three
    more, two of which are slow. A query that is too large for it is clamped.
    """
    if FP8 and query.dtype == tl.bfloat16:
        query = query.to(tl.float32)
        query = tl.maximum(query, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        query = tl.minimum(query, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    return query
