"""Products of 2 to 64 rows with a 16-bit weight on tensor cores, with what stands before or after them.

The transposed product is computed, outᵀ = weight · xᵀ: the weight's many rows are the long side of a tile, a few rows
of x the short one, for which tensor cores take 8. A weight does not depend on the kernel before, so a program asks for
its share *before* it waits (see `pdl`). Where the share is small it is *held*: what is left on the way from one product
to the next is to read x, to multiply and to write. A longer share is asked for ahead in the L2 cache and read turn by
turn. Tiles of few rows of the weight are shared by warps (*ways*), each of which multiplies some of the inputs, so that
none waits for a long chain of products; from 64 rows on a group of four warps multiplies a tile at once.

A weight of few rows would leave most of a GPU idle: from 9 rows of x on its inputs are split among programs, of which
the one that finishes last adds the others' parts to its own, in their order, so that the result does not depend on who
it was. Up to 8 rows programs that hold all inputs are faster (a network with one of two kinds of split products so, and
not split: 546 instead of 578 µs).

Measured on an H200 (4.46 TB/s) without attention, 28 layers of Qwen3-0.6B, for which the weights alone take 198 µs:

| rows | here | cuBLAS | GEMV | parts summed in the norm |
|---|---|---|---|---|
| 1 | 423 | 906 | 355 | 529 |
| 2 | 429 | 870 | 498 | 538 |
| 4 | 436 | 794 | 731 | 540 |
| 8 | 455 | 735 | | 558 |
| 16 | 620 | 748 | | 814 |
| 32 | 670 | 760 | | 634 |
| 64 | 771, 762 where `down` is cuBLAS's | 783 | | 742 |

*Parts summed in the norm* after them, with no program that waits for others, need a second form of the norm, win 5 % at
32 rows and 3 % at 64, and take a quarter longer up to 16. Within 3 % either way: letting the next kernel begin only
once the weights are there (8 rows: 469, not 455; 32 rows: 650, not 671), weights that the cache drops first (451, not
458; 665, not 671).

Reference: `layers.linear.Linear` without Triton.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, let_next_begin, prefetch, wait

SHARED_BYTES = 160 * 1024  # that a program may have; Triton 3.6 takes up to 144 KiB
_PROGRAMS = 128  # inputs are split until there are so many
_MAX_SPLITS = 8
_MAX_HELD = 3  # turns
_MOST_TILES = 2 * _PROGRAMS  # that programs share: 128 times 64 rows of the weight, for two tiles of x
_ADD_ROWS = 16  # of x in such a tile
_BLOCK = 64  # rows of the weight that four warps multiply at once
_STAGES_BYTES = 128 * 1024  # of turns on their way
_STAGES_INPUTS = 512
_LINE = tl.constexpr(64)  # numbers of a cache line
_AHEAD = tl.constexpr(1024)  # inputs asked for in the L2 cache: 128 KiB a program, of 50 MiB
_PLAIN, _GATED, _ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        rows: of x, in a tile.
        block: rows of the weight in a tile (of gate and of up, each, where it is gated).
        part: inputs of a turn.
        ways: warps that share a turn's inputs, of a held share; 1: four warps share the rows of a block of 64.
        held: whether all weights of a program are read before it waits; needed where x is normed.
        splits: programs that share the inputs of a tile.
        stages: turns on their way at a time, where they are not held.
    """

    rows: int
    block: int
    part: int
    ways: int = 1
    held: bool = False
    splits: int = 1
    stages: int = 4

    def turns(self, columns: int) -> int:
        """Turns of a program."""
        return triton.cdiv(triton.cdiv(columns, self.part), self.splits)


class SplitScratch:
    """Where programs that share a tile leave their parts; the counters are zero between two launches."""

    def __init__(self, device: torch.device) -> None:
        # Splits make less than twice as many programs as there should be, for each of two tiles of x.
        self.parts = torch.empty(2 * _MOST_TILES * _BLOCK * _ADD_ROWS, device=device)
        self.num_done = torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def runs_on(device: torch.device) -> bool:
    """Whether a program may have the shared memory it needs there: yes on an A100 or H100, not on an RTX 4090."""
    if device.type != "cuda":
        return True  # Triton's interpreter
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] >= SHARED_BYTES


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    dependent: bool,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """`x · weightᵀ`, or with `gated`, the weight being [gate; up], `silu(gate) · up` of it.

    Args:
        x: [R, K], contiguous, of 16 bits.
        weight: [N, K], contiguous, of the same type; N even if gated.
        norm: weight [K] and eps of an RMS norm that x goes through first, see `takes_norm`.
        gated: the result has N / 2 columns then.
        dependent: launched as a dependent of the kernel before, see `pdl`.
        tiling: without splits; None chooses one.
    """
    (rows, columns), size = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    tiling = tiling or choose_tiling(rows, size, columns, gated=gated, normed=norm is not None)
    out = x.new_empty(rows, size)
    _launch(x, norm, weight, out, (x, x), tiling, _GATED if gated else _PLAIN, dependent)
    return out


def add_skinny_gemm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scratch: SplitScratch,
    *,
    dependent: bool,
    tiling: Tiling | None = None,
) -> None:
    """`residual += x · weightᵀ`: residual [R, N], contiguous, R ≤ 32; the others as for `skinny_gemm`."""
    rows, size = residual.shape
    tiling = tiling or choose_add_tiling(rows, size, x.shape[1])
    _launch(x, None, weight, residual, (scratch.parts, scratch.num_done), tiling, _ADD, dependent)


def takes_norm(rows: int, columns: int, *, gated: bool) -> bool:
    """Whether x is normed inside a product: every program does so, and has all of x in registers.

    Of 9 to 16 rows only a gated product makes enough of what is normed: at 16 rows 620 µs a network, not 667; the
    others take 769, and 726 with a norm of their own.
    """
    return (rows <= 8 and columns <= 2048) or (gated and rows <= 16 and columns <= 1024)


def choose_tiling(rows: int, size: int, columns: int, *, gated: bool = False, normed: bool = False) -> Tiling:
    """The tiling of `skinny_gemm`, for `rows` of x, and `size` outputs of `columns` inputs."""
    tile_rows = min(max(8, triton.next_power_of_2(rows)), 64)
    if normed:
        part = _part(columns, 1024)
        one_turn = part >= columns  # two fill the registers of four warps
        block = 32 if one_turn and not gated and size >= 32 * _PROGRAMS else 16
        return Tiling(tile_rows, block, part, ways=4 if one_turn else 8, held=True)
    read = (2 * _BLOCK if gated else _BLOCK) + tile_rows
    part = _part(columns, 128 if read <= 160 else 64)
    return Tiling(tile_rows, _BLOCK, part, stages=min(_STAGES_INPUTS // part, _STAGES_BYTES // (2 * part * read)))


def choose_add_tiling(rows: int, size: int, columns: int) -> Tiling:
    """The tiling of `add_skinny_gemm`, for `rows` of x, and `size` outputs of `columns` inputs."""
    part = _part(columns, 1024)
    if rows <= 8 and columns <= _MAX_HELD * part:
        return Tiling(8, 16, part, ways=8, held=True)
    part = _part(columns, 128)
    turns = triton.cdiv(columns, part)
    splits = min(_MAX_SPLITS, triton.cdiv(_PROGRAMS, triton.cdiv(size, _BLOCK)))
    each = triton.cdiv(turns, splits)
    return Tiling(8 if rows <= 8 else _ADD_ROWS, _BLOCK, part, held=each <= _MAX_HELD, splits=triton.cdiv(turns, each))


def _part(columns: int, most: int) -> int:
    return min(most, max(128, triton.next_power_of_2(columns)))


def _launch(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    tiling: Tiling,
    mode: tl.constexpr,
    dependent: bool,
) -> None:
    (rows, size), columns = out.shape, x.shape[1]
    turns = tiling.turns(columns)
    tiles = triton.cdiv(size, tiling.block), triton.cdiv(rows, tiling.rows)
    if tiling.splits > 1 and tiles[0] * tiles[1] > _MOST_TILES:
        raise ValueError(f"{rows} rows of {size} outputs are {tiles} tiles; up to {_MOST_TILES} may be split")
    _skinny_gemm[*tiles, tiling.splits](
        x,
        weight if norm is None else norm[0],
        weight,
        out,
        *scratch,
        0.0 if norm is None else norm[1],
        rows,
        SIZE=size,
        COLUMNS=columns,
        BLOCK=tiling.block,
        TILE_ROWS=tiling.rows,
        PART=tiling.part,
        WAYS=tiling.ways,
        TURNS=turns,
        HELD=tiling.held,
        WHOLE=columns == tiling.part * turns * tiling.splits,
        STAGES=tiling.stages,
        MODE=mode,
        NORMED=norm is not None,
        SPLIT=tiling.splits > 1,
        DEPENDENT=dependent,
        num_warps=max(tiling.ways, 4),
        **launch_options(dependent),
    )


@triton.jit(do_not_specialize=["rows"])
def _skinny_gemm(  # noqa: C901, PLR0912 - see tests/unit/house/test_size.py
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    parts_ptr,
    done_ptr,
    eps,
    rows,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PART: tl.constexpr,
    WAYS: tl.constexpr,
    TURNS: tl.constexpr,
    HELD: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    MODE: tl.constexpr,
    NORMED: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # Tiles are [rows, inputs], or [ways, rows, inputs of a way]; sums are [rows of the weight, rows of x].
    let_next_begin(DEPENDENT)
    n, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside, known = n < SIZE, row < rows
    n_read = n if SIZE % BLOCK == 0 else tl.minimum(n, SIZE - 1)  # what is outside is not stored
    first = tl.program_id(2) * TURNS * PART
    up_ptr = weight_ptr + SIZE * COLUMNS if MODE == _GATED else weight_ptr
    total = _zeros(BLOCK, TILE_ROWS, WAYS)
    up_total = total
    if HELD:
        one = tl.arange(0, 1)
        weights: tl.tuple = ()
        ups: tl.tuple = ()
        norms: tl.tuple = ()
        for turn in tl.static_range(TURNS):
            weights += (_tile(weight_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
            if MODE == _GATED:
                ups += (_tile(up_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
            if NORMED:
                norms += (_tile(norm_ptr, one, None, turn * PART, COLUMNS, PART, WAYS, WHOLE).to(tl.float32),)
        wait(DEPENDENT)
        xs: tl.tuple = ()
        for turn in tl.static_range(TURNS):
            xs += (_tile(x_ptr, row, known, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
        if NORMED:
            squares = tl.zeros([TILE_ROWS], tl.float32)
            for turn in tl.static_range(TURNS):
                squares += _sum_of_squares(xs[turn].to(tl.float32), WAYS)
            scale = tl.rsqrt(squares / COLUMNS + eps)
            scale = scale[:, None] if WAYS == 1 else scale[None, :, None]
            normed: tl.tuple = ()
            for turn in tl.static_range(TURNS):
                normed += ((xs[turn].to(tl.float32) * scale * norms[turn]).to(weight_ptr.dtype.element_ty),)
            xs = normed
        for turn in tl.static_range(TURNS):
            total = _dot(weights[turn], xs[turn], total, WAYS)
            if MODE == _GATED:
                up_total = _dot(ups[turn], xs[turn], up_total, WAYS)
    else:
        if DEPENDENT:
            _prefetch_tile(weight_ptr, n_read, first, COLUMNS, min(TURNS * PART, _AHEAD))
            if MODE == _GATED:
                _prefetch_tile(up_ptr, n_read, first, COLUMNS, min(TURNS * PART, _AHEAD))
        wait(DEPENDENT)
        for turn in tl.range(0, TURNS, num_stages=STAGES):
            start = first + turn * PART
            x = _tile(x_ptr, row, known, start, COLUMNS, PART, WAYS, WHOLE)
            total = _dot(_tile(weight_ptr, n_read, None, start, COLUMNS, PART, WAYS, WHOLE), x, total, WAYS)
            if MODE == _GATED:
                up_total = _dot(_tile(up_ptr, n_read, None, start, COLUMNS, PART, WAYS, WHOLE), x, up_total, WAYS)
    if WAYS > 1:
        total = tl.sum(total, 0)
        if MODE == _GATED:
            up_total = tl.sum(up_total, 0)
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
    if MODE == _GATED:
        total = total / (1 + tl.exp(-total)) * up_total
    place, stored = out_ptr + row[None, :].to(tl.int64) * SIZE + n[:, None], known[None, :] & inside[:, None]
    if MODE == _ADD:
        total += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _tile(
    matrix, row, known, first, COLUMNS: tl.constexpr, PART: tl.constexpr, WAYS: tl.constexpr, WHOLE: tl.constexpr
):
    """PART numbers from `first` on of each `row` of a matrix; zeros where a row is not `known`, if that is given."""
    if WAYS == 1:
        at = row[:, None].to(tl.int64) * COLUMNS
        k = first + tl.arange(0, PART)[None, :]
        inside = None if known is None else known[:, None]
    else:
        EACH: tl.constexpr = PART // WAYS
        at = row[None, :, None].to(tl.int64) * COLUMNS
        k = first + tl.arange(0, WAYS)[:, None, None] * EACH + tl.arange(0, EACH)[None, None, :]
        inside = None if known is None else known[None, :, None]
    if WHOLE:
        if known is None:
            return tl.load(matrix + at + k)
        else:
            return tl.load(matrix + at + k, mask=inside, other=0.0)
    elif known is None:
        return tl.load(matrix + at + k, mask=k < COLUMNS, other=0.0)
    else:
        return tl.load(matrix + at + k, mask=inside & (k < COLUMNS), other=0.0)


@triton.jit
def _prefetch_tile(matrix, row, first, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Asks for COUNT numbers from `first` on of each `row`, without waiting."""
    for start in tl.static_range(0, COUNT, 8 * _LINE):
        k = tl.minimum(first + start + tl.arange(0, 8) * _LINE, COLUMNS - 1)
        prefetch(matrix + row[:, None].to(tl.int64) * COLUMNS + k[None, :])


@triton.jit
def _sum_of_squares(x, WAYS: tl.constexpr):
    if WAYS == 1:
        return tl.sum(x * x, 1)
    else:
        return tl.sum(tl.sum(x * x, 2), 0)


@triton.jit
def _zeros(BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, WAYS: tl.constexpr):
    if WAYS == 1:
        return tl.zeros([BLOCK, TILE_ROWS], tl.float32)
    else:
        return tl.zeros([WAYS, BLOCK, TILE_ROWS], tl.float32)


@triton.jit
def _dot(weight, x, total, WAYS: tl.constexpr):
    """`total + weight · xᵀ`, way by way."""
    if WAYS == 1:
        return tl.dot(weight, tl.trans(x), total)
    else:
        return tl.dot(weight, tl.permute(x, (0, 2, 1)), total)
