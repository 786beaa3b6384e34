"""Products of a few tens of rows with a 16-bit weight on tensor cores, with what stands before or after them.

The transposed product is computed, outᵀ = weight · xᵀ: the weight's many rows are the long side of a tile, a few rows
of x the short one, for which tensor cores take 8. A weight does not depend on the kernel before, so a program brings
the first turns of its share into shared memory *before* it waits (see `pdl`): what is left on the way from one product
to the next is to read x, to multiply and to write. Warps share a turn's inputs (*ways*) and add up at its end, so that
no warp waits for a long chain of products; with one way a group of four warps multiplies 64 rows of the weight at once.

A weight of few rows would leave most of a GPU idle: its inputs are split among several programs then, of which the one
that finishes last adds the others' parts to its own, in their order, so that the result does not depend on who it was.

Reference: `layers.linear.Linear` without Triton.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, let_next_begin, prefetch, wait

_PROGRAMS = 128  # inputs are split until there are so many, but less than twice as many
_MAX_SPLITS = 8
_MOST_NUMBERS = 64 * 64  # of a tile of outputs that programs share
_SHARED_BYTES = 200 * 1024  # of a program; 227 KiB are there
_LINE = tl.constexpr(64)  # numbers of a cache line
_PLAIN, _GATED, _ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        rows: of x, in a tile.
        block: rows of the weight in a tile (of gate and of up, each, where it is gated).
        part: inputs of a turn.
        ways: groups of warps that share a turn's inputs; each multiplies tiles of 16 rows of the weight.
        held: turns whose weights are in shared memory before the kernel waits; all, where x is normed.
        splits: programs that share the inputs of a tile.
        num_warps: of a program.
        stages: turns on their way at a time, of those that are not held.
    """

    rows: int
    block: int
    part: int
    ways: int = 1
    held: int = 0
    splits: int = 1
    num_warps: int = 4
    stages: int = 4

    def turns(self, columns: int) -> int:
        """Turns of a program."""
        return triton.cdiv(triton.cdiv(columns, self.part), self.splits)


class SplitScratch:
    """Where programs that share a tile leave their parts; the counters are zero between two launches."""

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(2 * _PROGRAMS * _MOST_NUMBERS, device=device)
        self.num_done = torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)


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
        norm: weight [K] and eps of an RMS norm that x goes through first.
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
    scratch: SplitScratch | None,
    *,
    dependent: bool,
    tiling: Tiling | None = None,
) -> None:
    """`residual += x · weightᵀ`: residual [R, N], contiguous; the others as for `skinny_gemm`.

    Without `scratch` the inputs are not split.
    """
    rows, size = residual.shape
    tiling = tiling or choose_tiling(rows, size, x.shape[1], may_split=scratch is not None)
    shared = (x, x) if scratch is None else (scratch.parts, scratch.num_done)
    _launch(x, None, weight, residual, shared, tiling, _ADD, dependent)


def choose_tiling(
    rows: int, size: int, columns: int, *, gated: bool = False, normed: bool = False, may_split: bool = False
) -> Tiling:
    """The tiling for `rows` of x, and `size` outputs of `columns` inputs."""
    tile_rows = min(max(8, triton.next_power_of_2(rows)), 32)
    block = 16 if gated or may_split or size < 32 * _PROGRAMS else 32
    if tile_rows > 16 and not normed:
        return _for_many_rows(rows, tile_rows, size, columns, gated=gated, may_split=may_split)
    part = min(1024, max(128, triton.next_power_of_2(columns)))
    turns = triton.cdiv(columns, part)
    splits = _splits(turns, triton.cdiv(size, block) * triton.cdiv(rows, tile_rows)) if may_split else 1
    held = triton.cdiv(turns, splits)
    row_bytes = 2 * part * ((2 * block if gated else block) + tile_rows)
    if not normed:
        held = min(held, max(1, _SHARED_BYTES // row_bytes))
    return Tiling(tile_rows, block, part, ways=8, held=held, splits=splits, num_warps=8, stages=2)


def takes_norm(rows: int, columns: int) -> bool:
    """Whether so many rows may be normed inside a product: every program has them in registers whole."""
    return rows <= 16 and columns <= 2048


def _for_many_rows(rows: int, tile_rows: int, size: int, columns: int, *, gated: bool, may_split: bool) -> Tiling:
    block = 32 if gated else 64
    part = min(128, max(64, triton.next_power_of_2(columns)))
    tiles = triton.cdiv(size, block) * triton.cdiv(rows, tile_rows)
    splits = _splits(triton.cdiv(columns, part), tiles) if may_split else 1
    return Tiling(tile_rows, block, part, splits=splits, num_warps=4, stages=4)


def _splits(turns: int, tiles: int) -> int:
    """Programs for each tile: the fewest that divide the turns and make enough programs, if any do."""
    if tiles >= _PROGRAMS:
        return 1
    possible = [each for each in range(1, _MAX_SPLITS + 1) if turns % each == 0 and each * tiles < 2 * _PROGRAMS]
    return next((each for each in possible if each * tiles >= _PROGRAMS), possible[-1])


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
    _skinny_gemm[triton.cdiv(size, tiling.block), triton.cdiv(rows, tiling.rows), tiling.splits](
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
        HELD=min(tiling.held, turns),
        WHOLE=columns == tiling.part * turns * tiling.splits,
        STAGES=tiling.stages,
        MODE=mode,
        NORMED=norm is not None,
        SPLIT=tiling.splits > 1,
        DEPENDENT=dependent,
        num_warps=tiling.num_warps,
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
    one = tl.arange(0, 1)
    held: tl.tuple = ()
    ups: tl.tuple = ()
    norms: tl.tuple = ()
    for turn in tl.static_range(HELD):
        held += (_tile(weight_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
        if MODE == _GATED:
            ups += (_tile(up_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
        if NORMED:
            norms += (_tile(norm_ptr, one, None, turn * PART, COLUMNS, PART, WAYS, WHOLE).to(tl.float32),)
    if DEPENDENT and TURNS > HELD:
        _prefetch_tile(weight_ptr, n_read, first + HELD * PART, COLUMNS, (TURNS - HELD) * PART)
        if MODE == _GATED:
            _prefetch_tile(up_ptr, n_read, first + HELD * PART, COLUMNS, (TURNS - HELD) * PART)
    wait(DEPENDENT)
    xs: tl.tuple = ()
    for turn in tl.static_range(HELD):
        xs += (_tile(x_ptr, row, known, first + turn * PART, COLUMNS, PART, WAYS, WHOLE),)
    if NORMED:
        squares = tl.zeros([TILE_ROWS], tl.float32)
        for turn in tl.static_range(HELD):
            squares += _sum_of_squares(xs[turn].to(tl.float32), WAYS)
        scale = tl.rsqrt(squares / COLUMNS + eps)
        scale = scale[:, None] if WAYS == 1 else scale[None, :, None]
        normed: tl.tuple = ()
        for turn in tl.static_range(HELD):
            normed += ((xs[turn].to(tl.float32) * scale * norms[turn]).to(weight_ptr.dtype.element_ty),)
        xs = normed
    total = _zeros(BLOCK, TILE_ROWS, WAYS)
    up_total = total
    for turn in tl.static_range(HELD):
        total = _dot(held[turn], xs[turn], total, WAYS)
        if MODE == _GATED:
            up_total = _dot(ups[turn], xs[turn], up_total, WAYS)
    for turn in tl.range(HELD, TURNS, num_stages=STAGES):
        x = _tile(x_ptr, row, known, first + turn * PART, COLUMNS, PART, WAYS, WHOLE)
        total = _dot(_tile(weight_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE), x, total, WAYS)
        if MODE == _GATED:
            up = _tile(up_ptr, n_read, None, first + turn * PART, COLUMNS, PART, WAYS, WHOLE)
            up_total = _dot(up, x, up_total, WAYS)
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
