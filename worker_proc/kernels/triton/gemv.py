"""Products with one row on CUDA cores, with what stands before or after them in the network.

Tensor cores, whose tiles have at least 8 rows, only add latency for one (from two on they win, see `skinny_gemm`). A
program has a few rows of the weight in registers *before* it waits for the kernel before it (see `pdl`), so the weights
of the next product are on their way while the last one ends; every program norms the activations itself (2 KiB, from
the L2 cache), so that norm, product, SiLU and residual are one kernel.

Reference: `layers.linear.Linear` without Triton.
"""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait

_COLUMNS = 1024  # of one tile where rows are not normed
_NORMED, _GATED = tl.constexpr(0), tl.constexpr(1)


def normed_gemv(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, *, gated: bool, dependent: bool
) -> torch.Tensor:
    """`rms_norm(x) · weightᵀ`, or with `gated`, the weight being [gate; up], `silu(gate) · up` of it.

    Args:
        x: [1, K], contiguous.
        norm_weight: [K].
        eps: of the norm.
        weight: [N, K], contiguous; N even if gated.
        gated: the result has N / 2 columns then.
        dependent: launched as a dependent of the kernel before, see `pdl`.
    """
    columns, size = x.shape[1], weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(1, size)
    block = 4 if gated else 8
    _normed_gemv[(triton.cdiv(size, block),)](
        x,
        norm_weight,
        weight,
        out,
        eps,
        SIZE=size,
        COLUMNS=columns,
        PADDED=triton.next_power_of_2(columns),
        BLOCK=block,
        MODE=_GATED if gated else _NORMED,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )
    return out


def add_gemv(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, dependent: bool) -> None:
    """`residual += x · weightᵀ`: residual [1, N], x [1, K], weight [N, K], all contiguous."""
    columns = x.shape[1]
    block = 4
    _add_gemv[(triton.cdiv(weight.shape[0], block),)](
        residual,
        x,
        weight,
        SIZE=weight.shape[0],
        COLUMNS=columns,
        TILE=min(_COLUMNS, triton.next_power_of_2(columns)),
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    """WHOLE: nothing lies outside; a mask costs instructions even where it is always true."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _normed_gemv(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    n, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    inside = (n < SIZE)[:, None] & (k < COLUMNS)[None, :]
    at = weight_ptr + n[:, None].to(tl.int64) * COLUMNS + k[None, :]
    WHOLE: tl.constexpr = (PADDED == COLUMNS) & (SIZE % BLOCK == 0)
    weight = _load(at, inside, WHOLE)
    up = weight
    if MODE == _GATED:
        up = _load(at + SIZE * COLUMNS, inside, WHOLE)
    norm = _load(norm_ptr + k, k < COLUMNS, WHOLE).to(tl.float32)
    wait(DEPENDENT)
    x = _load(x_ptr + k, k < COLUMNS, WHOLE).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + eps) * norm
    normed = normed.to(weight_ptr.dtype.element_ty).to(tl.float32)[None, :]  # rounded as the norm alone rounds
    product = tl.sum(weight.to(tl.float32) * normed, 1)
    if MODE == _GATED:
        product = product / (1 + tl.exp(-product)) * tl.sum(up.to(tl.float32) * normed, 1)
    tl.store(out_ptr + n, product.to(out_ptr.dtype.element_ty), mask=n < SIZE)


@triton.jit
def _add_gemv(
    residual_ptr,
    x_ptr,
    weight_ptr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    n, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILE)
    inside = n[:, None] < SIZE
    at = weight_ptr + n[:, None].to(tl.int64) * COLUMNS + k[None, :]
    WHOLE: tl.constexpr = (COLUMNS % TILE == 0) & (SIZE % BLOCK == 0)
    # Three tiles are on their way before the wait: 3,072 columns, which is most of what small models have.
    weight_0 = _load(at, inside & (k < COLUMNS)[None, :], WHOLE)
    weight_1, weight_2 = weight_0, weight_0
    if COLUMNS > TILE:
        weight_1 = _load(at + TILE, inside & (k + TILE < COLUMNS)[None, :], WHOLE)
    if COLUMNS > 2 * TILE:
        weight_2 = _load(at + 2 * TILE, inside & (k + 2 * TILE < COLUMNS)[None, :], WHOLE)
    wait(DEPENDENT)
    x = x_ptr + k
    part = weight_0.to(tl.float32) * _load(x, k < COLUMNS, WHOLE).to(tl.float32)[None, :]
    if COLUMNS > TILE:
        x_1 = _load(x + TILE, k + TILE < COLUMNS, WHOLE).to(tl.float32)
        part += weight_1.to(tl.float32) * x_1[None, :]
    if COLUMNS > 2 * TILE:
        x_2 = _load(x + 2 * TILE, k + 2 * TILE < COLUMNS, WHOLE).to(tl.float32)
        part += weight_2.to(tl.float32) * x_2[None, :]
    for first in range(3 * TILE, COLUMNS, TILE):
        known = k + first < COLUMNS
        weight = _load(at + first, inside & known[None, :], WHOLE).to(tl.float32)
        part += weight * _load(x + first, known, WHOLE).to(tl.float32)[None, :]
    result = tl.load(residual_ptr + n, mask=n < SIZE, other=0.0).to(tl.float32) + tl.sum(part, 1)
    tl.store(residual_ptr + n, result.to(residual_ptr.dtype.element_ty), mask=n < SIZE)
