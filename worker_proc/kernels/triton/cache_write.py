"""Writes the K and V of a chunk's tokens to the cache. Reference: the first lines of `TorchNaiveStep.attend`."""

import torch
import triton
import triton.language as tl


def write_to_cache(
    key_and_value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor, first_token: int
) -> None:
    """Writes the tokens from `first_token` on.

    Args:
        key_and_value: [T, 2 · Hkv, head_dim], all K heads, then all V heads; a head is contiguous.
        kv_layer: [2, Hkv, blocks, block_size, head_dim], contiguous.
        slot_mapping: int64 [T]: block id · block_size + place in the block; below 0: the token is not written.
        first_token: tokens before it are not written.
    """
    num_tokens, heads, head_dim = key_and_value.shape
    _, _, num_blocks, block_size, _ = kv_layer.shape
    _write_to_cache[(num_tokens - first_token,)](
        key_and_value,
        kv_layer,
        slot_mapping,
        first_token,
        key_and_value.stride(0),
        num_blocks * block_size * head_dim,
        heads,
        triton.next_power_of_2(heads),
        head_dim,
        triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit
def _write_to_cache(
    new_ptr,
    kv_ptr,
    slots_ptr,
    first_token,
    new_stride,
    head_stride,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = first_token + tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head, column = tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED)
    inside = (head < HEADS)[:, None] & (column < tl.where(slot >= 0, HEAD_DIM, 0))[None, :]
    new = tl.load(new_ptr + token * new_stride + head[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
    # K heads, then V heads: the cache has them in the same order, one stride apart.
    at = kv_ptr + head[:, None].to(tl.int64) * head_stride + slot * HEAD_DIM + column[None, :]
    tl.store(at, new.to(kv_ptr.dtype.element_ty), mask=inside)
