"""A 4-bit weight as 16-bit floats, for products of many rows by cuBLAS. Reference: `Quantized.dequantize`."""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.int4_numbers import of_block, unpack
from folovllm.worker_proc.layers.int4_words import Int4Words

_WARPS = 4
_BLOCK, _WORDS = 8, 512  # rows of a tile; words of one at least, see `int4_gemv`
_MIDDLE = tl.constexpr(8)


def expand(weight: Int4Words, first: int, out: torch.Tensor) -> None:
    """Writes rows of the weight from `first` on to `out`: [R, K], contiguous; inputs stay in the weight's order."""
    block = max(_BLOCK, _WORDS // weight.chunk)
    _expand[(triton.cdiv(out.shape[0], block), weight.num_blocks)](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out,
        first,
        out.shape[0],
        weight.out_features,
        COLUMNS=weight.in_features,
        CHUNK=weight.chunk,
        GROUP_SIZE=weight.group_size,
        NUM_GROUPS=weight.num_groups,
        BLOCK=block,
        ASYMMETRIC=weight.zeros is not None,
        ASSEMBLY=out.is_cuda,
        num_warps=_WARPS,
    )


@triton.jit
def _expand(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    first,
    num_rows,
    size,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    row, block, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.arange(0, CHUNK)
    inside = (row < num_rows)[:, None]
    n = (first + row)[:, None]
    at = words_ptr + (n.to(tl.int64) * tl.num_programs(1) + block) * CHUNK + i[None, :]
    numbers = unpack(tl.load(at, mask=inside, other=0), out_ptr.dtype.element_ty, ASSEMBLY)
    s = of_block(scales_ptr + n, inside, block, size, CHUNK, GROUP_SIZE, NUM_GROUPS)
    z = s
    if ASYMMETRIC:
        z = of_block(zeros_ptr + n, inside, block, size, CHUNK, GROUP_SIZE, NUM_GROUPS)
    for chunk in tl.static_range(8):
        value = numbers[chunk].to(tl.float32)
        if ASYMMETRIC:
            value -= z[chunk].to(tl.float32) - _MIDDLE
        value *= s[chunk].to(tl.float32)
        k = (block * 8 + chunk) * CHUNK + i[None, :]
        place = out_ptr + row[:, None].to(tl.int64) * COLUMNS + k
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside & (k < COLUMNS))
