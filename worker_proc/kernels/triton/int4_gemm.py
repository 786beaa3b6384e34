"""Products of tens of rows with a 4-bit weight on tensor cores, with SiLU or the residual after them.

The transposed product is computed, outᵀ = weight · xᵀ: the weight's many rows are the long side of a tile, a few rows
of x the short one, for which tensor cores take 8. Numbers become floats in registers on their way into the product
and are whole numbers there: exact. The scale is applied to a chunk's sum, in float32 (*exact*), or, where tiles are
large and that would cost more than it saves, to the numbers, rounded once more (*folded*).

A weight of few rows would leave most of a GPU idle: its inputs are split among several programs then, of which the one
that finishes last adds the others' parts to its own, in their order, so that the result does not depend on who it was.

Reference: `quantization.storage.Quantized.dequantize` and `layers.linear.Linear` without Triton.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.int4_numbers import of_block, prefetch_groups, prefetch_words, unpack
from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait
from folovllm.worker_proc.layers.int4_words import Int4Words

_MOST_PROGRAMS = 768  # of a product whose inputs are split
_SPLITS = (1, 2, 3, 4, 6, 8)
_FOLDED_FROM = 65  # rows of x
_STAGES = 3
_UNBOUNDED = 2**31
_LINE_WORDS = 32
_MIDDLE = tl.constexpr(8)
_PLAIN, _GATED, _ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        rows: of x, in a tile.
        block: rows of the weight in a tile; a warp multiplies 16.
        slice_words: words of each that a turn of the loop takes.
        splits: programs that share the inputs of a tile.
    """

    rows: int
    block: int
    slice_words: int
    splits: int = 1

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.block // 16


# Up to so many rows of x. Each is the best, or within 5 % of it (down at 16 rows: 13 %), of some ten that were measured
# on an H200 with the products of Qwen3-0.6B, weights cold, at 8, 16, 32, 64, 128 and 256 rows. What is added to a
# residual has few rows of weight and many inputs, which are split; a program's share of them is given in words.
_TILINGS = (
    (8, Tiling(8, 32, 64)),
    (16, Tiling(8, 64, 32)),
    (32, Tiling(16, 64, 32)),
    (128, Tiling(32, 64, 32)),
    (_UNBOUNDED, Tiling(64, 128, 32)),
)
_ADD_TILINGS = (
    (8, Tiling(8, 16, 32), 128),
    (16, Tiling(8, 32, 64), 64),
    (64, Tiling(16, 32, 32), 64),
    (_UNBOUNDED, Tiling(32, 64, 32), 128),
)
_GATED_SLICE = 32  # gate and up are read at once; a tile of 64 × 32 takes all 255 registers, and 96 bytes of stack
_LARGEST_BYTES = 160 * 1024  # of shared memory that the last tiling takes


class SplitScratch:
    """Where programs that share a tile leave their parts; the counters are zero between two launches."""

    def __init__(self, device: torch.device) -> None:
        most = max(tiling.rows * tiling.block for _, tiling, _ in _ADD_TILINGS)
        self.parts = torch.empty(_MOST_PROGRAMS * most, device=device)
        self.num_done = torch.zeros(_MOST_PROGRAMS, dtype=torch.int32, device=device)


def int4_gemm(
    x: torch.Tensor, weight: Int4Words, bias: torch.Tensor | None, *, gated: bool = False, dependent: bool
) -> torch.Tensor:
    """`y = x · weightᵀ + bias`, or with `gated`, the weight being [gate; up], `silu(gate) · up` of it.

    Args:
        x: [R, K] in the weight's order, contiguous.
        weight: [N, K]; N even if gated.
        bias: [N] or None.
        gated: the result has N / 2 columns then.
        dependent: launched as a dependent of the kernel before, see `pdl`.
    """
    out = x.new_empty(x.shape[0], weight.out_features // 2 if gated else weight.out_features)
    tiling = choose_tiling(out.shape[0], weight, gated=gated, shared_bytes=_shared_bytes(x.device))
    _launch(x, weight, bias, out, (x, x), tiling, _GATED if gated else _PLAIN, dependent)
    return out


def add_int4_gemm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: Int4Words,
    bias: torch.Tensor | None,
    scratch: SplitScratch,
    *,
    dependent: bool,
) -> None:
    """`residual += x · weightᵀ + bias`: residual [R, N], contiguous; the others as for `int4_gemm`."""
    tiling = choose_add_tiling(residual.shape[0], weight)
    _launch(x, weight, bias, residual, (scratch.parts, scratch.num_done), tiling, _ADD, dependent)


def choose_tiling(rows: int, weight: Int4Words, *, gated: bool = False, shared_bytes: int = _LARGEST_BYTES) -> Tiling:
    """The tiling for `rows` of x, of a product that is not split; `shared_bytes`: that a program may have."""
    tiling = next(each for most, each in _TILINGS if rows <= most)
    most = _GATED_SLICE if gated else tiling.slice_words
    if rows > _TILINGS[-2][0] and shared_bytes < _LARGEST_BYTES:
        most //= 2
    return dataclasses.replace(tiling, slice_words=_slice(tiling, weight, most))


def choose_add_tiling(rows: int, weight: Int4Words) -> Tiling:
    """The tiling for `rows` of x, of a product that is added to a residual."""
    tiling, share = next((each, share) for most, each, share in _ADD_TILINGS if rows <= most)
    slice_words, width = _slice(tiling, weight, tiling.slice_words), weight.words.shape[1]
    most = _MOST_PROGRAMS // (triton.cdiv(weight.out_features, tiling.block) * triton.cdiv(rows, tiling.rows))
    possible = [
        each for each in _SPLITS if each <= most and each * share <= width and width % (each * slice_words) == 0
    ]
    return dataclasses.replace(tiling, slice_words=slice_words, splits=max(possible, default=1))


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _LARGEST_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _slice(tiling: Tiling, weight: Int4Words, most: int) -> int:
    return min(tiling.slice_words, most, weight.chunk)


def _launch(
    x: torch.Tensor,
    weight: Int4Words,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    tiling: Tiling,
    mode: tl.constexpr,
    dependent: bool,
) -> None:
    rows, size = out.shape
    slices = weight.words.shape[1] // tiling.slice_words // tiling.splits
    grid = triton.cdiv(size, tiling.block), triton.cdiv(rows, tiling.rows), tiling.splits
    _int4_gemm[grid](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if bias is None else bias,
        out,
        *scratch,
        rows,
        size,
        COLUMNS=weight.in_features,
        CHUNK=weight.chunk,
        NUM_BLOCKS=weight.num_blocks,
        GROUP_SIZE=weight.group_size,
        NUM_GROUPS=weight.num_groups,
        PADDED_GROUPS=triton.next_power_of_2(weight.num_groups),
        BLOCK=tiling.block,
        TILE_ROWS=tiling.rows,
        SLICE=tiling.slice_words,
        NUM_SLICES=slices,
        LINES=triton.next_power_of_2(triton.cdiv(slices * tiling.slice_words, _LINE_WORDS)),
        STAGES=_STAGES,
        MODE=mode,
        SPLIT=tiling.splits > 1,
        FOLDED=rows >= _FOLDED_FROM,
        ASYMMETRIC=weight.zeros is not None,
        BIASED=bias is not None,
        DEPENDENT=dependent,
        ASSEMBLY=x.is_cuda,
        num_warps=tiling.num_warps,
        **launch_options(dependent),
    )


@triton.jit
def _int4_gemm(  # noqa: C901, PLR0912 - see tests/unit/house/test_size.py
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    done_ptr,
    rows,
    size,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    MODE: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLDED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIASED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    # Tiles are [rows of the weight, inputs or rows of x].
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = NUM_BLOCKS * CHUNK
    IN_BLOCK: tl.constexpr = CHUNK // SLICE
    ONE_BLOCK: tl.constexpr = IN_BLOCK % NUM_SLICES == 0  # a program's slices; its scales are read before the loop
    n, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside, known = n < size, row < rows
    first = tl.program_id(2) * NUM_SLICES
    stride = size * 2 if MODE == _GATED else size
    rows_ptr = words_ptr + tl.minimum(n, size - 1)[:, None].to(tl.int64) * WIDTH  # what is outside is not stored
    up_rows_ptr = rows_ptr + size.to(tl.int64) * WIDTH
    s, z, up_s, up_z = _fetch(
        scales_ptr + n, zeros_ptr + n, inside, first // IN_BLOCK, size, CHUNK, GROUP_SIZE, NUM_GROUPS, MODE, ASYMMETRIC
    )
    if DEPENDENT:
        prefetch_words(rows_ptr, first * SLICE, NUM_SLICES * SLICE, LINES)
        prefetch_groups(scales_ptr + tl.program_id(0) * BLOCK, stride, NUM_GROUPS, PADDED_GROUPS)
        if MODE == _GATED:
            prefetch_words(up_rows_ptr, first * SLICE, NUM_SLICES * SLICE, LINES)
            prefetch_groups(scales_ptr + size + tl.program_id(0) * BLOCK, stride, NUM_GROUPS, PADDED_GROUPS)
    wait(DEPENDENT)
    total, up_total = tl.zeros([BLOCK, TILE_ROWS], tl.float32), tl.zeros([BLOCK, TILE_ROWS], tl.float32)
    word = tl.arange(0, SLICE)
    for number in tl.range(first, first + NUM_SLICES, num_stages=STAGES):
        block = number // IN_BLOCK
        if not ONE_BLOCK:
            s, z, up_s, up_z = _fetch(
                scales_ptr + n, zeros_ptr + n, inside, block, size, CHUNK, GROUP_SIZE, NUM_GROUPS, MODE, ASYMMETRIC
            )
        numbers = unpack(tl.load(rows_ptr + number * SLICE + word[None, :]), TYPE, ASSEMBLY)
        up_numbers = numbers
        if MODE == _GATED:
            up_numbers = unpack(tl.load(up_rows_ptr + number * SLICE + word[None, :]), TYPE, ASSEMBLY)
        for chunk in tl.static_range(8):
            k = (block * 8 + chunk) * CHUNK + number % IN_BLOCK * SLICE + word
            at = x_ptr + row[None, :] * COLUMNS + k[:, None]
            x = tl.load(at, mask=known[None, :] & (k < COLUMNS)[:, None], other=0.0)
            total = _add_chunk(total, numbers[chunk], s[chunk], z[chunk], x, FOLDED, ASYMMETRIC)
            if MODE == _GATED:
                up_total = _add_chunk(up_total, up_numbers[chunk], up_s[chunk], up_z[chunk], x, FOLDED, ASYMMETRIC)
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        at = tl.arange(0, BLOCK)[:, None] * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
        at += tile * tl.num_programs(2) * BLOCK * TILE_ROWS
        tl.store(parts_ptr + at + tl.program_id(2) * BLOCK * TILE_ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + tile, 1, sem="acq_rel") != tl.num_programs(2) - 1:
            return
        total = tl.zeros([BLOCK, TILE_ROWS], tl.float32)
        for part in range(tl.num_programs(2)):
            total += tl.load(parts_ptr + at + part * BLOCK * TILE_ROWS, cache_modifier=".cg")
        tl.store(done_ptr + tile, 0)
    if BIASED:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if MODE == _GATED:
        if BIASED:
            up_total += tl.load(bias_ptr + size + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        total = total / (1 + tl.exp(-total)) * up_total
    place, stored = out_ptr + row[None, :].to(tl.int64) * size + n[:, None], known[None, :] & inside[:, None]
    if MODE == _ADD:
        total += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _fetch(
    scales,
    zeros,
    inside,
    block,
    size,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """A block's eight scales and eight zeros [BLOCK], and the same of the rows of `up`, if there are any."""
    stride = size * 2 if MODE == _GATED else size
    s = of_block(scales, inside, block, stride, CHUNK, GROUP_SIZE, NUM_GROUPS)
    z, up_s, up_z = s, s, s
    if ASYMMETRIC:
        z = of_block(zeros, inside, block, stride, CHUNK, GROUP_SIZE, NUM_GROUPS)
    if MODE == _GATED:
        up_s = of_block(scales + size, inside, block, stride, CHUNK, GROUP_SIZE, NUM_GROUPS)
        if ASYMMETRIC:
            up_z = of_block(zeros + size, inside, block, stride, CHUNK, GROUP_SIZE, NUM_GROUPS)
    return s, z, up_s, up_z


@triton.jit
def _add_chunk(total, numbers, scale, zero, x, FOLDED: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """`total` [BLOCK, TILE_ROWS] with a chunk's product added.

    Args:
        numbers: less the middle [BLOCK, SLICE].
        scale, zero: [BLOCK].
        x: [SLICE, TILE_ROWS].
    """
    if ASYMMETRIC:
        numbers -= (zero.to(tl.float32) - _MIDDLE).to(numbers.dtype)[:, None]  # whole numbers from -15 to 15
    if FOLDED:
        return tl.dot(numbers * scale.to(numbers.dtype)[:, None], x, total, input_precision="ieee")
    else:
        return total + tl.dot(numbers, x, input_precision="ieee") * scale.to(tl.float32)[:, None]
