"""Products of many bf16 rows with a weight in oneDNN's blocks (or in 4 bits), as vector code for other kernels to call.

Work is cut into units of 32 outputs: a unit of the weight, at most some 100 kB, meets some 256 rows, a panel, and stays
in the cache meanwhile, so every weight is read once for them. Sums are float32. Two forms; `wide_step.wide_form` says
which:

    AMX     tiles of 16 x 32 numbers: 32 rows and 32 outputs are four tiles of sums, two of rows and two of weights
    PAIRS   `vdpbf16ps`: 8 rows and 32 outputs are sixteen vectors of sums; two neighbouring inputs of a row, spread

Both take the layout with two inputs side by side as it is. 4-bit weights are expanded to it, a unit at a time, in
memory of the thread's own: what is read from memory stays a quarter.

A row's result does not depend on the others: every output adds its products up in the order of the inputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.chunk_products import Form
from folovllm.worker_proc.kernels.cpu.gemv import ELEMENT_BYTES, FLOAT_BYTES, LANES, ProductShape
from folovllm.worker_proc.kernels.cpu.int4 import expansion_function
from folovllm.worker_proc.kernels.cpu.llvm import BF16, F32, I8, I32, I64, Inner, Kernel
from folovllm.worker_proc.layers.blocked import BlockLayout
from folovllm.worker_proc.layers.int4_layout import Int4Layout

TILE: Final = 16  # rows; buffers have room for whole tiles
UNIT: Final = 32  # outputs
_STEP: Final = 32  # inputs of a tile
_PAIR_ROWS: Final = 8  # rows whose sums are in registers
_STEP_BYTES: Final = _STEP * ELEMENT_BYTES
_UNIT_LINE: Final = UNIT * 2 * ELEMENT_BYTES  # bytes of a unit's weights for two inputs
_AHEAD_PAIRS: Final = 32  # prefetch distance, in lines of 128 bytes
_PAIRS_AT_ONCE: Final = 4  # of inputs, written one after another
PANEL_TILES: Final = 16
PAIR_TILES: Final = 2  # that are multiplied at once
PAIR_BYTES: Final = PAIR_TILES * TILE * UNIT * FLOAT_BYTES  # their sums of a unit
_PAIRS: Final = ir.VectorType(BF16, 2 * LANES)
_FLOATS: Final = ir.VectorType(F32, LANES)


def takes(shape: ProductShape) -> bool:
    """Whether a weight is made of whole units and whole steps."""
    layout = shape.layout
    if isinstance(layout, BlockLayout) and (layout.kind != "bfloat16" or layout.group != 2):
        return False
    whole = shape.padded_out % UNIT == 0 and shape.in_features % _STEP == 0 == shape.padded_in - shape.in_features
    return whole and (isinstance(layout, Int4Layout) or layout.width % UNIT == 0)


def expanded_bytes(shape: ProductShape) -> int:
    """What one unit takes in a thread's own memory."""
    return shape.padded_in * _UNIT_LINE // 2 if isinstance(shape.layout, Int4Layout) else 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of numbers one after another.

    Attributes:
        address: of the first.
        stride: bytes from row to row, a compiled number; 0 repeats the first.
    """

    address: Any
    stride: Any

    def part(self, k: Kernel, row: Any, offset: Any) -> "Rows":
        """From a row on, `offset` bytes into it."""
        return Rows(k.sum(self.address, k.product(row, self.stride), offset), self.stride)

    @property
    def numbers(self) -> list[Any]:
        return [self.address, self.stride]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """bf16 numbers that are multiplied, 16 rows (a tile) by 32 inputs (a step) at a time.

    Attributes:
        address: of the first.
        row: bytes from row to row of a tile, a compiled number as the others are.
        step: bytes from 32 inputs to the next 32.
        tile: bytes from 16 rows to the next 16.
    """

    address: Any
    row: Any
    step: Any
    tile: Any

    @classmethod
    def in_rows(cls, k: Kernel, address: Any, size: int) -> "Inputs":
        """Rows of `size` numbers one after another."""
        row = size * ELEMENT_BYTES
        return cls(address, k.integer(row), k.integer(_STEP_BYTES), k.integer(TILE * row))

    @classmethod
    def in_tiles(cls, k: Kernel, address: Any, size: int) -> "Inputs":
        """The same numbers, tile by tile: what AMX reads at once lies together (products 5 to 10 % faster)."""
        tile = TILE * size * ELEMENT_BYTES
        return cls(address, k.integer(_STEP_BYTES), k.integer(TILE * _STEP_BYTES), k.integer(tile))

    def part(self, k: Kernel, tile: Any, step: Any) -> "Inputs":
        """From a tile and a step on."""
        place = k.sum(self.address, k.product(tile, self.tile), k.product(step, self.step))
        return dataclasses.replace(self, address=place)

    def line(self, k: Kernel, row: Any, step: Any) -> Any:
        """Address of 32 numbers of a row."""
        tile, within = k.builder.lshr(row, k.integer(4)), k.builder.and_(row, k.integer(TILE - 1))
        return k.sum(self.part(k, tile, step).address, k.product(within, self.row))

    @property
    def numbers(self) -> list[Any]:
        return [self.address, self.row, self.step, self.tile]


Operands = tuple[Inputs, Rows, Rows]  # what is multiplied, what it is added to, where it goes


class TileProducts:
    """The functions of a form, in the module of `kernel`."""

    def __init__(self, kernel: Kernel, form: Form, layouts: Sequence[BlockLayout | Int4Layout]) -> None:
        products: _Form = _Amx() if form is Form.AMX else _Pairs(kernel)
        groups = {
            (tiles, fetch): _group_function(kernel, products, tiles, fetch=fetch)
            for tiles in (1, 2)
            for fetch in (True, False)
        }
        self._part_steps = products.part_steps
        self._panel = self._panel_function(kernel, groups)
        self._expansions = {
            layout: expansion_function(kernel, layout, BlockLayout(UNIT, 2, "bfloat16"))
            for layout in dict.fromkeys(layouts)
            if isinstance(layout, Int4Layout)
        }

    def unit(self, k: Kernel, shape: ProductShape, weight: Any, index: Any, own: Any) -> "UnitWeight":
        """Where unit number `index` of a weight lies; one of 4 bits is expanded to address `own` for that."""
        layout = shape.layout
        if isinstance(layout, Int4Layout):
            block_bytes = k.integer(layout.block_bytes(shape.padded_in))
            per_unit = UNIT // layout.width
            for part in range(per_unit):
                block = k.sum(k.product(index, k.integer(per_unit)), k.integer(part))
                source = k.sum(weight, k.product(block, block_bytes))
                target = k.sum(own, k.integer(part * LANES * 2 * ELEMENT_BYTES))
                k.invoke(self._expansions[layout], source, target, k.integer(shape.padded_in))
            return UnitWeight(own, _UNIT_LINE, shape.padded_in, fetch=False)
        per_block = k.integer(layout.width // UNIT)
        block, part = k.builder.sdiv(index, per_block), k.builder.srem(index, per_block)
        place = k.product(block, k.integer(shape.padded_in * layout.width * ELEMENT_BYTES))
        start = k.sum(weight, place, k.product(part, k.integer(_UNIT_LINE)))
        return UnitWeight(start, layout.width * 2 * ELEMENT_BYTES, shape.padded_in, fetch=True)

    def emit(self, k: Kernel, weight: "UnitWeight", x: Inputs, base: Rows, out: Rows, num_tiles: Any) -> None:
        """`out = base + x · weightᵀ` for the unit's 32 outputs and all tiles of 16 rows.

        Args:
            k: whose code calls.
            weight: what `unit` has given.
            x: all padded inputs; of pairs in rows.
            base: float32, from the unit's first output on; may be `out`.
            out: float32, the same.
            num_tiles: of 16 rows, at least one; what lies in rows past the last is overwritten.
        """

        def some(panel: Panel) -> None:
            self.panel(k, weight, (panel.inputs(k, x), panel.of(k, base), panel.of(k, out)), panel)

        for_panels(k, (k.integer(0), num_tiles), some)

    def panel(self, k: Kernel, weight: "UnitWeight", operands: Operands, panel: "Panel") -> None:
        """The same for the rows of one panel, which `operands` (x, base, out) begin with."""
        numbers = [number for each in operands for number in each.numbers]
        fetch = k.builder.zext(panel.is_first, I64) if weight.fetch else k.integer(0)
        k.invoke(
            self._panel, weight.address, k.integer(weight.line), k.integer(weight.inputs), *numbers, panel.size, fetch
        )

    def _panel_function(self, kernel: Kernel, groups: dict[tuple[int, bool], Inner]) -> Inner:
        """One panel: inputs in parts, so that a unit's part stays in the nearest cache while all rows pass by."""
        f = kernel.inner("panel", 13)
        weight, line, inputs, *numbers, num_tiles, fetch = (f.argument(index) for index in range(13))
        x, base, out = _operands(numbers)
        b, one, two = f.builder, f.integer(1), f.integer(2)
        steps = b.sdiv(inputs, f.integer(_STEP))
        parts = b.sdiv(f.sum(steps, f.integer(self._part_steps - 1)), f.integer(self._part_steps))
        parts = b.select(b.icmp_signed("<=", num_tiles, two), one, parts)
        size = b.sdiv(b.sub(f.sum(steps, parts), one), parts)
        with f.loop(f.integer(0), parts) as part:
            first = f.product(part, size)
            count = f.product(f.smaller(size, b.sub(steps, first)), f.integer(_STEP))
            is_first = b.icmp_signed("==", part, f.integer(0))
            lines = (f.sum(weight, f.product(f.product(first, f.integer(_STEP // 2)), line)), line, count)
            rows = x.part(f, f.integer(0), first)
            sums = Rows(b.select(is_first, base.address, out.address), b.select(is_first, base.stride, out.stride))
            is_far = b.icmp_signed("!=", fetch, f.integer(0))
            is_single = b.icmp_signed("==", num_tiles, one)
            operands = (rows, sums, out)
            for single, far in ((True, True), (True, False), (False, True), (False, False)):
                fits = b.and_(is_single if single else b.not_(is_single), is_far if far else b.not_(is_far))
                with f.when(fits):
                    self._group(f, groups[1 if single else 2, far], lines, operands, f.integer(0))
            num_pairs = b.sdiv(num_tiles, two)
            with f.loop(one, num_pairs) as pair:
                self._group(f, groups[2, False], lines, operands, f.product(pair, two))
            with f.loop(b.select(is_single, one, f.product(num_pairs, two)), num_tiles) as tile:  # once at most
                self._group(f, groups[1, False], lines, operands, tile)
        return f.end()

    def _group(self, f: Inner, group: Inner, lines: tuple[Any, Any, Any], operands: Operands, tile: Any) -> None:
        row = f.product(tile, f.integer(TILE))
        x, base, out = operands
        numbers = x.part(f, tile, f.integer(0)).numbers
        for rows in (base, out):
            numbers += rows.part(f, row, f.integer(0)).numbers
        f.invoke(group, *lines, *numbers)


@dataclasses.dataclass(frozen=True)
class Panel:
    """So many rows that their sums of a unit stay in the second cache.

    Attributes:
        tile: number of its first tile, a compiled number.
        size: its tiles, the same.
        is_first: whether it is the first that a unit meets, the same.
    """

    tile: Any
    size: Any
    is_first: Any

    def of(self, k: Kernel, rows: Rows) -> Rows:
        """Its rows of all."""
        return rows.part(k, k.product(self.tile, k.integer(TILE)), k.integer(0))

    def inputs(self, k: Kernel, x: Inputs) -> Inputs:
        """The same of what is multiplied."""
        return x.part(k, self.tile, k.integer(0))


def for_panels(k: Kernel, tiles: tuple[Any, Any], body: Callable[[Panel], None], size: int = PANEL_TILES) -> None:
    """Code that does `body` for all tiles from the first to before the end, `size` at a time."""
    most, (first, end) = k.integer(size), tiles
    count = k.builder.sdiv(k.sum(k.builder.sub(end, first), k.integer(size - 1)), most)
    with k.loop(k.integer(0), count) as index:
        tile = k.sum(first, k.product(index, most))
        is_first = k.builder.icmp_signed("==", index, k.integer(0))
        body(Panel(tile, k.smaller(most, k.builder.sub(end, tile)), is_first))


@dataclasses.dataclass(frozen=True)
class UnitWeight:
    """A unit's weights [inputs / 2, 32, 2].

    Attributes:
        address: of the first.
        line: bytes from two inputs' to the next two's.
        inputs: how many.
        fetch: whether it has to be asked for ahead.
    """

    address: Any
    line: int
    inputs: int
    fetch: bool


class _Form(Protocol):
    """How some tiles of rows are multiplied with a unit."""

    part_steps: int  # inputs, 32 at a time, that all rows of a panel meet before the next ones

    def emit(self, f: Inner, weight: "_Lines", operands: Operands, num_tiles: int) -> None:
        """`operands`: as in `TileProducts.emit`."""


@dataclasses.dataclass(frozen=True)
class _Lines:
    """A unit's weights inside of a function.

    Attributes:
        address: of the first.
        line: bytes from two inputs' to the next two's.
        inputs: how many.
        fetch: whether they are asked for ahead.
    """

    f: Inner
    address: Any
    line: Any
    inputs: Any
    fetch: bool

    def of_step(self, step: Any) -> Any:
        """Address of the weights of 32 inputs."""
        first = self.f.product(step, self.f.integer(_STEP // 2))
        for pair in range(_STEP // 2):
            self._ask_for(self.f.sum(first, self.f.integer(pair)))
        return self._address(first)

    def of_pair(self, pair: Any) -> Any:
        """Address of the weights of two inputs."""
        self._ask_for(pair)
        return self._address(pair)

    def _address(self, pair: Any) -> Any:
        return self.f.sum(self.address, self.f.product(self.line, pair))

    def _ask_for(self, pair: Any) -> None:
        """Asks for what comes some pairs later."""
        if self.fetch:
            later = self._address(self.f.sum(pair, self.f.integer(_AHEAD_PAIRS)))
            for part in range(0, _UNIT_LINE, 64):
                self.f.prefetch(self.f.sum(later, self.f.integer(part)))


def _group_function(kernel: Kernel, form: _Form, num_tiles: int, *, fetch: bool) -> Inner:
    f = kernel.inner(f"unit_{num_tiles}_{'fetched' if fetch else 'near'}", 11)
    numbers = [f.argument(index) for index in range(11)]
    form.emit(f, _Lines(f, numbers[0], numbers[1], numbers[2], fetch), _operands(numbers[3:]), num_tiles)
    return f.end()


def _operands(numbers: Sequence[Any]) -> Operands:
    return Inputs(*numbers[:4]), Rows(*numbers[4:6]), Rows(*numbers[6:8])


class _Amx(_Form):
    """Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights."""

    part_steps = 64

    def emit(self, f: Inner, weight: _Lines, operands: Operands, num_tiles: int) -> None:
        x, base, out = operands
        places = [(2 * row + half, row, half) for row in range(num_tiles) for half in (0, 1)]
        for tile, row, half in places:
            self._move(f, "tileloadd64", tile, base.part(f, f.integer(row * TILE), f.integer(half * _STEP_BYTES)))
        with f.loop(f.integer(0), f.builder.sdiv(weight.inputs, f.integer(_STEP))) as step:
            weights = Rows(weight.of_step(step), weight.line)
            for row in range(num_tiles):
                self._move(f, "tileloadd64", 4 + row, Rows(x.part(f, f.integer(row), step).address, x.row))
            for half in (0, 1):
                self._move(f, "tileloadd64", 6 + half, weights.part(f, f.integer(0), f.integer(half * _STEP_BYTES)))
            for tile, row, half in places:
                f.call("llvm.x86.tdpbf16ps", ir.VoidType(), *(_i8(each) for each in (tile, 4 + row, 6 + half)))
        for tile, row, half in places:
            self._move(f, "tilestored64", tile, out.part(f, f.integer(row * TILE), f.integer(half * _STEP_BYTES)))

    def _move(self, f: Inner, name: str, tile: int, rows: Rows) -> None:
        pointer = f.builder.inttoptr(rows.address, I8.as_pointer())
        f.call(f"llvm.x86.{name}", ir.VoidType(), _i8(tile), pointer, rows.stride)


class _Pairs(_Form):
    part_steps = 10  # 20 kB of a unit

    def __init__(self, kernel: Kernel) -> None:
        self._eights = {fetch: self._eight(kernel, fetch=fetch) for fetch in (True, False)}

    def emit(self, f: Inner, weight: _Lines, operands: Operands, num_tiles: int) -> None:
        x, base, out = operands
        for part in range(num_tiles * TILE // _PAIR_ROWS):
            first = f.integer(part * _PAIR_ROWS)
            numbers = [
                number
                for rows in (Rows(x.address, x.row), base, out)
                for number in rows.part(f, first, f.integer(0)).numbers
            ]
            f.invoke(self._eights[weight.fetch and part == 0], weight.address, weight.line, weight.inputs, *numbers)

    def _eight(self, kernel: Kernel, *, fetch: bool) -> Inner:
        """Eight rows; arguments as those of `_group_function`."""
        f = kernel.inner(f"eight_rows_{'fetched' if fetch else 'near'}", 9)
        numbers = [f.argument(index) for index in range(9)]
        weight = _Lines(f, numbers[0], numbers[1], numbers[2], fetch)
        x, base, out = (
            [Rows(*numbers[at : at + 2]).part(f, f.integer(row), f.integer(0)).address for row in range(_PAIR_ROWS)]
            for at in (3, 5, 7)
        )
        places = [(row, half) for row in range(_PAIR_ROWS) for half in (0, 1)]

        def step(index: Any, sums: Sequence[Any]) -> list[Any]:
            found = list(sums)
            for each in range(_PAIRS_AT_ONCE):
                pair = f.sum(f.product(index, f.integer(_PAIRS_AT_ONCE)), f.integer(each))
                line = weight.of_pair(pair)
                weights = [f.load(line, f.integer(half * LANES), I32, LANES) for half in (0, 1)]
                for place, (row, half) in enumerate(places):
                    one = f.spread(f.load(x[row], pair, I32), LANES)
                    pairs = (f.builder.bitcast(words, _PAIRS) for words in (one, weights[half]))
                    found[place] = f.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, found[place], *pairs)
            return found

        sums = [f.load(base[row], f.integer(half * LANES), F32, LANES) for row, half in places]
        num_turns = f.builder.sdiv(weight.inputs, f.integer(2 * _PAIRS_AT_ONCE))
        for (row, half), total in zip(places, f.fold(num_turns, sums, step), strict=True):
            f.store(total, out[row], f.integer(half * LANES), F32, LANES)
        return f.end()


def _i8(value: int) -> Any:
    return ir.Constant(I8, value)
