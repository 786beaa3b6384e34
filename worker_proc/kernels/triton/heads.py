"""Norm (optional) and rotation of a token's query and key heads, in place, several heads a program.

Reference: `layers.norm.HeadNorm` and `layers.rotary.rotate_into`.
"""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait

_HEADS = 8  # of a program: 8 heads of 128 are 2 KiB, enough to keep four warps busy


def rotate_heads(
    heads: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 0.0,
    *,
    dependent: bool = False,
) -> None:
    """Norms each head with its row of `weight`, then rotates it, in place.

    Args:
        heads: [T, H, head_dim]; a head is contiguous, tokens may lie further apart.
        weight: [H, head_dim]; None leaves the norm out.
        cos, sin: [T, 1, head_dim], contiguous, as in `RotaryTable.rows`: the first half of `sin` is negated.
        eps: of the norm.
        dependent: launched as a dependent of the kernel before, see `pdl`.
    """
    num_tokens, num_heads, head_dim = heads.shape
    grid = (num_tokens, triton.cdiv(num_heads, _HEADS))
    with_norm = weight is not None
    pointers = (heads, weight if weight is not None else heads, cos, sin)
    sizes = (num_heads, head_dim, triton.next_power_of_2(head_dim), _HEADS)
    _rotate_heads[grid](
        *pointers, eps, heads.stride(0), *sizes, with_norm, dependent, num_warps=4, **launch_options(dependent)
    )


@triton.jit
def _rotate_heads(
    heads_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    token_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    WITH_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, PADDED)
    partner = (column + HEAD_DIM // 2) % HEAD_DIM  # the number that a column is rotated with
    inside = (head[:, None] < NUM_HEADS) & (column[None, :] < HEAD_DIM)
    in_row = column < HEAD_DIM
    at = head[:, None] * HEAD_DIM
    row = heads_ptr + token * token_stride + at
    x = tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # both are read before anything is written over them
    if WITH_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = x * scale * tl.load(weight_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        other = other * scale * tl.load(weight_ptr + at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HEAD_DIM + column, mask=in_row, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HEAD_DIM + column, mask=in_row, other=0.0).to(tl.float32)
    rotated = x * cos[None, :] + other * sin[None, :]
    tl.store(row + column[None, :], rotated.to(heads_ptr.dtype.element_ty), mask=inside)
