"""Products of a few rows (up to 4) with a 4-bit weight on CUDA cores, with what stands before or after them.

The twin of `gemv` for `layers.int4_words`: each program has a few rows of the weight, of which it holds the first block
in registers *before* it waits for the kernel before it (see `pdl`) and asks the cache for the others; it norms the
activations itself. Scales are applied to numbers, in float32: nothing is rounded but the normed activations, as the
norm alone rounds them, and the result.

Reference: `quantization.storage.Quantized.dequantize` and `layers.linear.Linear` without Triton.
"""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.int4_numbers import of_block, prefetch_groups, prefetch_words, unpack
from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait
from folovllm.worker_proc.layers.int4_words import Int4Words

MAX_ROWS = 4
_WARPS = 4
_WORDS = 512  # of a tile at least: a thread needs whole pairs of words, and loads four at once
_LINE_WORDS = 32
_MIDDLE = tl.constexpr(8)
_COLUMNS = tl.constexpr(1024)  # of a tile, where a row's sum of squares is taken
_PLAIN, _GATED, _ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def int4_gemv(
    x: torch.Tensor,
    weight: Int4Words,
    bias: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None = None,
    *,
    gated: bool = False,
    dependent: bool,
) -> torch.Tensor:
    """`y = f(x) · weightᵀ + bias`, or with `gated`, the weight being [gate; up], `silu(gate) · up` of it.

    Args:
        x: [R, K], contiguous, R ≤ 4.
        weight: [N, K]; N even if gated.
        bias: [N] or None.
        norm: weight [K] and epsilon of the RMS norm that f is; None: f is nothing.
        gated: the result has N / 2 columns then.
        dependent: launched as a dependent of the kernel before, see `pdl`.
    """
    out = x.new_empty(x.shape[0], weight.out_features // 2 if gated else weight.out_features)
    _launch(x, weight, bias, norm, out, _GATED if gated else _PLAIN, dependent)
    return out


def add_int4_gemv(
    residual: torch.Tensor, x: torch.Tensor, weight: Int4Words, bias: torch.Tensor | None, *, dependent: bool
) -> None:
    """`residual += x · weightᵀ + bias`: residual [R, N], contiguous; the others as for `int4_gemv`."""
    _launch(x, weight, bias, None, residual, _ADD, dependent)


def _launch(
    x: torch.Tensor,
    weight: Int4Words,
    bias: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    out: torch.Tensor,
    mode: tl.constexpr,
    dependent: bool,
) -> None:
    rows, size = out.shape
    block = max(8 if mode == _PLAIN else 4, _WORDS // weight.chunk)
    _int4_gemv[(triton.cdiv(size, block),)](
        x,
        x if norm is None else norm[0],
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if weight.order is None else weight.order,
        x if bias is None else bias,
        out,
        0.0 if norm is None else norm[1],
        SIZE=size,
        ROWS=rows,
        PADDED_ROWS=triton.next_power_of_2(rows),
        COLUMNS=weight.in_features,
        CHUNK=weight.chunk,
        NUM_BLOCKS=weight.num_blocks,
        LINES=triton.next_power_of_2(triton.cdiv(weight.words.shape[1], _LINE_WORDS)),
        GROUP_SIZE=weight.group_size,
        NUM_GROUPS=weight.num_groups,
        PADDED_GROUPS=triton.next_power_of_2(weight.num_groups),
        BLOCK=block,
        MODE=mode,
        NORMED=norm is not None,
        ASYMMETRIC=weight.zeros is not None,
        ORDERED=weight.order is not None,
        BIASED=bias is not None,
        DEPENDENT=dependent,
        ASSEMBLY=x.is_cuda,
        num_warps=_WARPS,
        **launch_options(dependent),
    )


@triton.jit
def _int4_gemv(
    x_ptr,
    norm_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    order_ptr,
    bias_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    NORMED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ORDERED: tl.constexpr,
    BIASED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    # Tiles are [rows of x, rows of the weight, inputs].
    WIDTH: tl.constexpr = NUM_BLOCKS * CHUNK
    STRIDE: tl.constexpr = 2 * SIZE if MODE == _GATED else SIZE
    first = tl.program_id(0) * BLOCK
    n = (first + tl.arange(0, BLOCK))[None, :, None]
    tile = _fetch(
        words_ptr, scales_ptr, zeros_ptr, n, 0, SIZE, NUM_BLOCKS, CHUNK, GROUP_SIZE, NUM_GROUPS, MODE, ASYMMETRIC
    )
    if DEPENDENT and NUM_BLOCKS > 1:
        rows_ptr = words_ptr + tl.minimum(first + tl.arange(0, BLOCK), SIZE - 1)[:, None].to(tl.int64) * WIDTH
        prefetch_words(rows_ptr, 0, WIDTH, LINES)
        prefetch_groups(scales_ptr + first, STRIDE, NUM_GROUPS, PADDED_GROUPS)
        if MODE == _GATED:
            prefetch_words(rows_ptr + SIZE * WIDTH, 0, WIDTH, LINES)
            prefetch_groups(scales_ptr + first + SIZE, STRIDE, NUM_GROUPS, PADDED_GROUPS)
    wait(DEPENDENT)
    row = tl.arange(0, PADDED_ROWS)
    factor = tl.full([PADDED_ROWS], 1.0, tl.float32)
    if NORMED:
        factor = _norm_factor(x_ptr, row, eps, ROWS, COLUMNS)
    inputs = (x_ptr, norm_ptr, order_ptr, factor[:, None, None], row[:, None, None])
    total = tl.zeros([PADDED_ROWS, BLOCK, CHUNK], tl.float32)
    up_total = tl.zeros([PADDED_ROWS, BLOCK, CHUNK], tl.float32)
    total, up_total = _add_block(
        total, up_total, tile, inputs, 0, ROWS, COLUMNS, MODE, NORMED, ASYMMETRIC, ORDERED, ASSEMBLY
    )
    for block in range(1, NUM_BLOCKS):
        tile = _fetch(
            words_ptr,
            scales_ptr,
            zeros_ptr,
            n,
            block,
            SIZE,
            NUM_BLOCKS,
            CHUNK,
            GROUP_SIZE,
            NUM_GROUPS,
            MODE,
            ASYMMETRIC,
        )
        total, up_total = _add_block(
            total, up_total, tile, inputs, block, ROWS, COLUMNS, MODE, NORMED, ASYMMETRIC, ORDERED, ASSEMBLY
        )
    product = tl.sum(total, 2)
    n, row = first + tl.arange(0, BLOCK)[None, :], tl.arange(0, PADDED_ROWS)[:, None]
    if BIASED:
        product += tl.load(bias_ptr + n, mask=n < SIZE, other=0.0).to(tl.float32)
    if MODE == _GATED:
        up = tl.sum(up_total, 2)
        if BIASED:
            up += tl.load(bias_ptr + SIZE + n, mask=n < SIZE, other=0.0).to(tl.float32)
        product = product / (1 + tl.exp(-product)) * up
    place, known = out_ptr + row * SIZE + n, (row < ROWS) & (n < SIZE)
    if MODE == _ADD:
        product += tl.load(place, mask=known, other=0.0).to(tl.float32)
    tl.store(place, product.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _fetch(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    n,
    block,
    SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """A block of rows `n`: words, eight scales, eight zeros, and the same of the rows of `up`, if there are any."""
    STRIDE: tl.constexpr = 2 * SIZE if MODE == _GATED else SIZE
    WIDTH: tl.constexpr = NUM_BLOCKS * CHUNK
    inside = n < SIZE
    at = words_ptr + n.to(tl.int64) * WIDTH + block * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    words = tl.load(at, mask=inside, other=0)
    s = of_block(scales_ptr + n, inside, block, STRIDE, CHUNK, GROUP_SIZE, NUM_GROUPS)
    z, up_words, up_s, up_z = s, words, s, s
    if ASYMMETRIC:
        z = of_block(zeros_ptr + n, inside, block, STRIDE, CHUNK, GROUP_SIZE, NUM_GROUPS)
    if MODE == _GATED:
        up_words = tl.load(at + SIZE * WIDTH, mask=inside, other=0)
        up_s = of_block(scales_ptr + SIZE + n, inside, block, STRIDE, CHUNK, GROUP_SIZE, NUM_GROUPS)
        if ASYMMETRIC:
            up_z = of_block(zeros_ptr + SIZE + n, inside, block, STRIDE, CHUNK, GROUP_SIZE, NUM_GROUPS)
    return words, s, z, up_words, up_s, up_z


@triton.jit
def _add_block(
    total,
    up_total,
    tile,
    inputs,
    block,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    NORMED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ORDERED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The totals [PADDED_ROWS, BLOCK, CHUNK] with a block's products added."""
    words, s, z, up_words, up_s, up_z = tile
    x_ptr, norm_ptr, order_ptr, factor, row = inputs
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK: tl.constexpr = total.shape[1]
    CHUNK: tl.constexpr = total.shape[2]
    numbers = unpack(words, TYPE, ASSEMBLY)
    up_numbers = numbers
    if MODE == _GATED:
        up_numbers = unpack(up_words, TYPE, ASSEMBLY)
    for chunk in tl.static_range(8):
        k = (block * 8 + chunk) * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        k = tl.broadcast_to(k, (1, BLOCK, CHUNK))  # so that inputs are loaded where the words are, not exchanged
        x = _inputs(x_ptr, norm_ptr, order_ptr, factor, row, k, ROWS, COLUMNS, NORMED, ORDERED)
        total += _weights(numbers[chunk], s[chunk], z[chunk], ASYMMETRIC) * x
        if MODE == _GATED:
            up_total += _weights(up_numbers[chunk], up_s[chunk], up_z[chunk], ASYMMETRIC) * x
    return total, up_total


@triton.jit
def _norm_factor(x_ptr, row, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What the RMS norm multiplies each row by, before its weight: [PADDED_ROWS]."""
    squares = tl.zeros([row.shape[0], _COLUMNS], tl.float32)
    for start in range(0, COLUMNS, _COLUMNS):
        column = start + tl.arange(0, _COLUMNS)[None, :]
        known = (row < ROWS)[:, None] & (column < COLUMNS)
        x = tl.load(x_ptr + row[:, None] * COLUMNS + column, mask=known, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / COLUMNS + eps)


@triton.jit
def _inputs(
    x_ptr,
    norm_ptr,
    order_ptr,
    factor,
    row,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMED: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Inputs `k` of the weight's order, normed if asked: float32 [PADDED_ROWS, BLOCK, CHUNK], 0 outside."""
    place = k
    if ORDERED:
        place = tl.load(order_ptr + k, mask=k < COLUMNS, other=0)
    x = tl.load(x_ptr + row * COLUMNS + place, mask=(row < ROWS) & (k < COLUMNS), other=0.0).to(tl.float32)
    if NORMED:
        norm = tl.load(norm_ptr + place, mask=k < COLUMNS, other=0.0).to(tl.float32)
        x = (x * factor * norm).to(x_ptr.dtype.element_ty).to(tl.float32)  # rounded as the norm alone rounds
    return x


@triton.jit
def _weights(numbers, scale, zero, ASYMMETRIC: tl.constexpr):
    """Numbers less the middle [1, BLOCK, CHUNK] → float32 weights."""
    numbers = numbers.to(tl.float32)
    if ASYMMETRIC:
        numbers -= zero.to(tl.float32) - _MIDDLE
    return numbers * scale.to(tl.float32)
