"""All layers of a step of many rows in one call: decoding requests, prompt chunks, or both. See `decode_step`.

    embedding
    layer: norm │ q k v, head norm, rotation, K and V to the cache │ attention │ o, added
         │ norm │ gate up, SiLU │ down, added
    last norm

What differs from a step of a few rows: rows are normed once, by one thread each, and are bf16 from there on, as
`tile_products` wants them, and so is what comes out of SiLU. What follows a product is done 32 rows at a time, while
their sums are in the nearest cache. Decoding requests and chunks each have their attention. Hidden states stay float32
from layer to layer.

Threads share a product's outputs, so that each weight is read once. From 128 rows for each thread on they share the
rows: then a thread finds in its own cache what it wrote in the part before (the products of a prompt of 1,024 take two
thirds of the time).

Why one call: some 450 operators of torch cost 40 ms a step on two cores, most of it spent waking threads that fell
asleep between two of them. Milliseconds of a step of SmolLM2-135M without its logits (2 cores of a Xeon with AMX):

    step                                          torch   this
    16 decodes at 255 tokens                         39     18
    64 decodes at 255 tokens                         93     47   (22 of it attention, 15 ms for its bytes)
    8 decodes at 500, a chunk of 16 at 1,000         48     21
    a prompt of 1,024                               467    190   (125 of it products with what follows, 56 attention)
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.chunk_products import Form, tiles
from folovllm.worker_proc.kernels.cpu.decode_step import (
    ACTIVATED,
    ATTENDED,
    ATTENTION,
    ATTENTION_ARGUMENTS,
    ATTENTION_STRIDE,
    CHUNK_ARGUMENTS,
    CHUNK_STRIDE,
    CHUNKS,
    DOWN,
    DOWN_BIAS,
    FINAL_NORM,
    GATE_UP_BIAS,
    GATE_UP_WEIGHT,
    HIDDEN,
    INPUT_NORM,
    NORMED,
    NUM_LAYER_FIELDS,
    NUM_LAYERS,
    OUT,
    OUT_BIAS,
    OUTPUT,
    OWN,
    POST_NORM,
    QKV,
    QKV_BIAS,
    QUERY,
    ZEROS,
    StepCode,
    StepShape,
    norm_function,
)
from folovllm.worker_proc.kernels.cpu.gemv import ELEMENT_BYTES, FLOAT_BYTES, LANES, ProductShape
from folovllm.worker_proc.kernels.cpu.llvm import F32, Kernel
from folovllm.worker_proc.kernels.cpu.tile_products import (
    PAIR_BYTES,
    PAIR_TILES,
    TILE,
    UNIT,
    Inputs,
    Panel,
    Rows,
    TileProducts,
    expanded_bytes,
    for_panels,
    takes,
)

_TILE_SHAPES_BYTES: Final = 128
SLICE_BYTES: Final = 3 * 2**18  # of what a product reads
_LOG2_E: Final = math.log2(math.e)
_MASK: Final = ir.IntType(LANES)
CUT_FROM: Final = 8  # tiles of each thread from which on rows are shared, not outputs


def wide_form(*, tiles_allowed: bool) -> Form | None:
    """How this processor multiplies bf16 numbers; None: it does not."""
    if tiles_allowed:
        return Form.AMX
    return Form.PAIRS if llvm.get_host_cpu_features().get("avx512bf16") else None


def can_be_wide(shape: StepShape) -> bool:
    """Whether a network's sizes are whole tiles."""
    fits = shape.intermediate % UNIT == 0 and all(takes(product) for product in shape.products)
    return fits and shape.kind == "bfloat16"


def own_bytes(shape: StepShape) -> int:
    """Memory of each thread's own: shapes of tiles, sums of gate and up, and two units expanded from 4 bits."""
    expanded = max(expanded_bytes(product) for product in shape.products)
    return _TILE_SHAPES_BYTES + max(2, shape.head_dim // UNIT) * (PAIR_BYTES + expanded)


def build_wide_step(shape: StepShape, form: Form) -> Kernel:
    """The function of all layers; its arguments are named in `decode_step`, ROW_COUNT being a multiple of 16."""
    kernel = Kernel("wide_step")
    _WideStep(kernel, shape, form).emit()
    return kernel


# What `build_wide_product`'s function is given: int64 numbers, addresses in bytes.
(
    X,  # bf16 [16 · tiles, inputs]
    NUM_TILES,
    WEIGHT,
    BIAS,  # float32 [outputs]
    PRODUCT_OWN,  # of each thread, `product_own_bytes`
    PRODUCT_OUT,  # float32 [16 · tiles, out stride]
    OUT_STRIDE,  # numbers from row to row
    PRODUCT_THREAD_NUM,
    PRODUCT_NUM_THREADS,
    PRODUCT_DRAWN,  # a counter for each thread, see `Kernel.drawn`
) = range(10)
NUM_PRODUCT_ARGUMENTS: Final = 10


def product_own_bytes(shape: ProductShape) -> int:
    """See `own_bytes`."""
    return _TILE_SHAPES_BYTES + expanded_bytes(shape)


def build_wide_product(shape: ProductShape, form: Form) -> Kernel:
    """`out = x · weightᵀ + bias` for many rows; the arguments are named above."""
    k = Kernel("wide_product")
    products = TileProducts(k, form, [shape.layout])
    thread, num_threads = k.call_int(k.argument(PRODUCT_THREAD_NUM)), k.argument(PRODUCT_NUM_THREADS)
    own = k.sum(k.argument(PRODUCT_OWN), k.product(thread, k.integer(product_own_bytes(shape))))
    x = Inputs.in_rows(k, k.argument(X), shape.padded_in)
    stride = k.product(k.argument(OUT_STRIDE), k.integer(FLOAT_BYTES))
    num_units, drawn = k.integer(shape.padded_out // UNIT), k.argument(PRODUCT_DRAWN)
    with tiles(k, form, own), k.drawn(num_units, drawn, (thread, num_threads)) as unit:
        column = k.product(unit, k.integer(UNIT * FLOAT_BYTES))
        base = Rows(k.sum(k.argument(BIAS), column), k.integer(0))
        out = Rows(k.sum(k.argument(PRODUCT_OUT), column), stride)
        expanded = k.sum(own, k.integer(_TILE_SHAPES_BYTES))
        source = products.unit(k, shape, k.argument(WEIGHT), unit, expanded)
        products.emit(k, source, x, base, out, k.argument(NUM_TILES))
    return k


class _WideStep(StepCode):
    def __init__(self, kernel: Kernel, shape: StepShape, form: Form) -> None:
        super().__init__(kernel, shape)
        self.form = form
        self.products = TileProducts(kernel, form, [product.layout for product in shape.products])
        self.norm = norm_function(kernel, shape.hidden, shape.eps, shape.kind, shape.kind)
        k, b = kernel, kernel.builder
        num_tiles = b.sdiv(self.row_count, k.integer(TILE))
        self.slices = {
            product: _Slices(k, num_tiles, self.num_threads, product.padded_in) for product in shape.products
        }
        self.tile_shapes = k.sum(k.argument(OWN), k.product(self.thread, k.integer(own_bytes(shape))))
        first = k.sum(self.tile_shapes, k.integer(_TILE_SHAPES_BYTES))
        self.sums = [first, k.sum(first, k.integer(PAIR_BYTES))]
        units = max(2, shape.head_dim // UNIT)
        size, start = max(expanded_bytes(product) for product in shape.products), units * PAIR_BYTES
        self.expanded = [k.sum(first, k.integer(start + unit * size)) for unit in range(units)]

    def emit(self) -> None:
        k, shape = self.k, self.shape
        self.embed()  # rows are shared as for the norm
        with tiles(k, self.form, self.tile_shapes), k.loop(k.integer(0), k.argument(NUM_LAYERS)) as layer:
            row = k.product(layer, k.integer(NUM_LAYER_FIELDS))
            self._norm_rows(self.field(row, INPUT_NORM), self._inputs(NORMED, shape.hidden))
            self.barrier()
            self._heads(row)
            self.barrier()
            self._attend(layer)
            self.barrier()
            attended = Inputs.in_rows(k, k.argument(ATTENDED), shape.out.in_features)
            self._added(shape.out, (row, OUT, OUT_BIAS), attended)
            self.barrier()
            self._norm_rows(self.field(row, POST_NORM), self._inputs(NORMED, shape.hidden))
            self.barrier()
            self._gated(row)
            self.barrier()
            self._added(shape.down, (row, DOWN, DOWN_BIAS), self._inputs(ACTIVATED, shape.intermediate))
            self.barrier()
        self._norm_rows(k.argument(FINAL_NORM), Inputs.in_rows(k, k.argument(OUTPUT), shape.hidden))

    def share_of_rows(self) -> tuple[Any, Any]:
        """This thread's rows: those of its slices, so that it finds in its cache what it wrote itself."""
        return self.slices[self.shape.gate_up].rows_of(self.k, self.rows, (self.thread, self.num_threads))

    def _inputs(self, argument: int, size: int) -> Inputs:
        """What products read: as AMX likes it, or in rows."""
        make = Inputs.in_tiles if self.form is Form.AMX else Inputs.in_rows
        return make(self.k, self.k.argument(argument), size)

    def _norm_rows(self, weight: Any, out: Inputs) -> None:
        """This thread's rows of the hidden states, normed."""
        k = self.k
        with k.loop(*self.share_of_rows()) as row:
            target = out.line(k, row, k.integer(0))
            k.invoke(self.norm, self.row_of(self.shared_rows(HIDDEN), row), weight, target, out.step)

    def _attend(self, layer: Any) -> None:
        k = self.k
        for function, arguments, stride in (
            (ATTENTION, ATTENTION_ARGUMENTS, ATTENTION_STRIDE),
            (CHUNKS, CHUNK_ARGUMENTS, CHUNK_STRIDE),
        ):
            address = k.argument(function)
            with k.when(k.builder.icmp_signed("!=", address, k.integer(0))):
                k.call_void(address, k.sum(k.argument(arguments), k.product(layer, k.argument(stride))))

    @contextmanager
    def _drawn_panels(
        self, shape: ProductShape, count: int, row: Any, weight: int
    ) -> Iterator[tuple[Any, Callable[..., None]]]:
        """A loop over pieces of a product's work in each slice: its number, and `for_panels` of the slice's rows."""
        k, slices = self.k, self.slices[shape]
        number = k.integer(count)
        with self.drawn(k.product(slices.count, number), row, weight) as item:
            part, index = k.builder.sdiv(item, number), k.builder.srem(item, number)
            yield index, functools.partial(for_panels, k, slices.tiles_of(k, part))

    def _heads(self, row: Any) -> None:
        """This thread's heads of q, k and v: rotated while they are hot, into QUERY and the cache."""
        k, shape = self.k, self.shape
        per_head = shape.head_dim // UNIT
        sums = Rows(self.sums[0], k.integer(shape.head_dim * FLOAT_BYTES))
        x, biases = self._inputs(NORMED, shape.hidden), self.field(row, QKV_BIAS)
        num_heads = shape.num_q_heads + 2 * shape.num_kv_heads
        with self._drawn_panels(shape.qkv, num_heads, row, QKV) as (head, panels):
            numbers = [k.sum(k.product(head, k.integer(per_head)), k.integer(part)) for part in range(per_head)]
            weight = self.field(row, QKV)
            units = [
                self.products.unit(k, shape.qkv, weight, number, expanded)
                for number, expanded in zip(numbers, self.expanded[:per_head], strict=True)
            ]
            starts = [k.product(number, k.integer(UNIT * FLOAT_BYTES)) for number in numbers]

            def some(panel: Panel) -> None:
                for part, (unit, start) in enumerate(zip(units, starts, strict=True)):
                    base = Rows(k.sum(biases, start), k.integer(0))
                    out = sums.part(k, k.integer(0), k.integer(part * UNIT * FLOAT_BYTES))
                    self.products.panel(k, unit, (panel.inputs(k, x), base, out), panel)
                self._write_head(row, head, sums, panel)

            panels(some, PAIR_TILES)

    def _write_head(self, row: Any, head: Any, sums: Rows, panel: Panel) -> None:
        k, shape, b = self.k, self.shape, self.k.builder
        queries, keys = k.integer(shape.num_q_heads), k.integer(shape.num_q_heads + shape.num_kv_heads)
        first, of_cache = k.product(panel.tile, k.integer(TILE)), b.sub(head, queries)
        count = k.smaller(k.product(panel.size, k.integer(TILE)), b.sub(self.rows, first))
        is_query, is_value = b.icmp_signed("<", head, queries), b.icmp_signed(">=", head, keys)

        def each_row(when: Any, write: Callable[[Any, Any], None]) -> None:
            with k.when(when), k.loop(k.integer(0), count) as number:
                write(k.sum(first, number), sums.part(k, number, k.integer(0)).address)

        def write_query(request: Any, source: Any) -> None:
            place = k.sum(k.product(request, queries), head)
            target = k.sum(k.argument(QUERY), k.product(place, k.integer(shape.head_dim * ELEMENT_BYTES)))
            self.rotate(row, (request, head), source, target)

        def write_key(request: Any, source: Any) -> None:
            self.rotate(row, (request, head), source, self.cached(row, request, of_cache))

        def write_value(request: Any, source: Any) -> None:
            self.store_value(source, self.cached(row, request, of_cache))

        each_row(is_query, write_query)
        each_row(b.and_(b.not_(is_query), b.not_(is_value)), write_key)
        each_row(is_value, write_value)

    def _added(self, shape: ProductShape, fields: tuple[Any, int, int], x: Inputs) -> None:
        """This thread's outputs, added to the hidden states."""
        k = self.k
        row, weight, bias = fields
        hidden = Rows(k.argument(HIDDEN), k.integer(self.stride_of(HIDDEN) * FLOAT_BYTES))
        biases = self.field(row, bias)
        with self._drawn_panels(shape, shape.padded_out // UNIT, row, weight) as (unit, panels):
            column = k.product(unit, k.integer(UNIT * FLOAT_BYTES))
            out = hidden.part(k, k.integer(0), column)
            source = self.products.unit(k, shape, self.field(row, weight), unit, self.expanded[0])

            def some(panel: Panel) -> None:
                sums = panel.of(k, out)
                with k.when(k.builder.icmp_signed("!=", biases, k.argument(ZEROS))):
                    self._add_bias(k.sum(biases, column), sums, k.product(panel.size, k.integer(TILE)))
                self.products.panel(k, source, (panel.inputs(k, x), sums, sums), panel)

            panels(some)

    def _add_bias(self, bias: Any, out: Rows, count: Any) -> None:
        k = self.k
        numbers = k.load(bias, k.integer(0), F32, UNIT)
        with k.loop(k.integer(0), count) as row:
            place = out.part(k, row, k.integer(0)).address
            k.store(k.plus(k.load(place, k.integer(0), F32, UNIT), numbers), place, k.integer(0), F32, UNIT)

    def _gated(self, row: Any) -> None:
        """This thread's columns of `silu(gate) · up`."""
        k, shape = self.k, self.shape
        num_units = shape.intermediate // UNIT
        x, activated = self._inputs(NORMED, shape.hidden), self._inputs(ACTIVATED, shape.intermediate)
        weight, biases = self.field(row, GATE_UP_WEIGHT), self.field(row, GATE_UP_BIAS)
        with self._drawn_panels(shape.gate_up, num_units, row, GATE_UP_WEIGHT) as (index, panels):
            halves = [index, k.sum(index, k.integer(num_units))]
            units = [
                self.products.unit(k, shape.gate_up, weight, unit, expanded)
                for unit, expanded in zip(halves, self.expanded, strict=True)
            ]
            bases = [
                Rows(k.sum(biases, k.product(unit, k.integer(UNIT * FLOAT_BYTES))), k.integer(0)) for unit in halves
            ]
            sums = [Rows(address, k.integer(UNIT * FLOAT_BYTES)) for address in self.sums]

            def some(panel: Panel) -> None:
                for unit, base, part in zip(units, bases, sums, strict=True):
                    self.products.panel(k, unit, (panel.inputs(k, x), base, part), panel)
                self._activate(sums, panel.inputs(k, activated), index, k.product(panel.size, k.integer(TILE)))

            panels(some, PAIR_TILES)

    def _activate(self, sums: list[Rows], out: Inputs, step: Any, num_rows: Any) -> None:
        k = self.k
        with k.loop(k.integer(0), num_rows) as row:
            gates, ups = (rows.part(k, row, k.integer(0)).address for rows in sums)
            target = out.line(k, row, step)
            for part in range(0, UNIT, LANES):
                place = k.integer(part)
                gate, up = k.load(gates, place, F32, LANES), k.load(ups, place, F32, LANES)
                k.store_floats(k.times(_silu(k, gate), up), target, place, LANES, self.shape.kind)


def _silu(k: Kernel, x: Any) -> Any:
    """x / (1 + e^-x), relative error below 1e-4: it is rounded to bf16 (a division alone takes 16 cycles)."""
    kind, most = ir.VectorType(F32, LANES), k.constant(125.0, LANES)
    scaled = k.times(x, k.constant(-_LOG2_E, LANES))
    bounded = k.builder.select(k.builder.fcmp_ordered(">", scaled, most), most, scaled)
    whole = k.plus(k.exp2(bounded, LANES), k.constant(1.0, LANES))
    inverse = k.call("llvm.x86.avx512.rcp14.ps.512", kind, whole, k.constant(0.0, LANES), ir.Constant(_MASK, -1))
    return k.times(x, inverse)


class _Slices:
    """How a product's rows are cut: all of them in one slice, or as many slices for each thread, whose inputs fit.

    A slice of 512 rows of 576 numbers and one of 256 of 1,536 stay in the second cache while all weights pass by.
    """

    def __init__(self, k: Kernel, num_tiles: Any, num_threads: Any, inputs: int) -> None:
        b, one = k.builder, k.integer(1)
        most = max(SLICE_BYTES // (TILE * inputs * ELEMENT_BYTES), 1)
        of_all = k.product(num_threads, k.integer(most))
        cut = k.product(b.sdiv(k.sum(num_tiles, b.sub(of_all, one)), of_all), num_threads)
        is_cut = b.icmp_signed(">=", num_tiles, k.product(num_threads, k.integer(CUT_FROM)))
        self.num_tiles, self.is_cut = num_tiles, b.and_(is_cut, b.icmp_signed(">", num_threads, one))
        self.count = b.select(self.is_cut, cut, one)
        self.size = b.sdiv(k.sum(num_tiles, b.sub(self.count, one)), self.count)

    def tiles_of(self, k: Kernel, index: Any) -> tuple[Any, Any]:
        """First tile of a slice, and the tile after its last."""
        first = k.product(index, self.size)
        return first, k.smaller(k.sum(first, self.size), self.num_tiles)

    def rows_of(self, k: Kernel, rows: Any, team: tuple[Any, Any]) -> tuple[Any, Any]:
        """First and end of a thread's rows."""
        b, (thread, num_threads) = k.builder, team
        of_thread = k.product(b.sdiv(self.count, num_threads), k.product(self.size, k.integer(TILE)))
        cut = [k.smaller(k.product(k.sum(thread, k.integer(turn)), of_thread), rows) for turn in (0, 1)]
        shared = k.share(rows, thread, num_threads)
        first, end = (b.select(self.is_cut, *each) for each in zip(cut, shared, strict=True))
        return first, end
