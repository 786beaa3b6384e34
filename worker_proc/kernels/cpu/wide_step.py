"""All layers of a step of many rows in one call: decoding requests, prompt chunks, or both. See `decode_step`.

    embedding
    layer: norm │ q k v │ head norm, rotation, K and V to the cache │ attention │ o, added
         │ norm │ gate up, SiLU │ down, added
    last norm

What differs from a step of a few rows: rows are normed once, by one thread each, and are bf16 from there on, as
`tile_products` wants them, and so is what comes out of SiLU, which is computed a panel at a time: sums of gate and up,
256 rows by 32, never leave the thread's own cache. Decoding requests and chunks each have their attention. Hidden
states stay float32 from layer to layer.

Why one call: some 450 operators of torch cost 40 ms a step on two cores, most of it spent waking threads that fell
asleep between two of them. Milliseconds of a step of SmolLM2-135M without its logits (2 cores of a Xeon with AMX):

    step                                          torch   this
    16 decodes at 255 tokens                         39     18
    64 decodes at 255 tokens                         93     47   (22 of it attention, 15 ms for its bytes)
    8 decodes at 500, a chunk of 16 at 1,000         48     21
    a prompt of 1,024                               467    235   (156 of it products, 62 attention)
"""

from typing import Any, Final

import llvmlite.binding as llvm

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
    HEADS,
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
    ZEROS,
    StepCode,
    StepShape,
    norm_function,
    silu,
)
from folovllm.worker_proc.kernels.cpu.gemv import ELEMENT_BYTES, FLOAT_BYTES, LANES, ProductShape
from folovllm.worker_proc.kernels.cpu.llvm import F32, Kernel
from folovllm.worker_proc.kernels.cpu.tile_products import (
    PANEL_BYTES,
    TILE,
    UNIT,
    Panel,
    Rows,
    TileProducts,
    expanded_bytes,
    for_panels,
    takes,
)

_TILE_SHAPES_BYTES: Final = 128


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
    return _TILE_SHAPES_BYTES + 2 * PANEL_BYTES + 2 * max(expanded_bytes(product) for product in shape.products)


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
    x = Rows(k.argument(X), k.integer(shape.padded_in * ELEMENT_BYTES))
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
        self.num_tiles = kernel.builder.sdiv(self.row_count, kernel.integer(TILE))
        k = kernel
        self.tile_shapes = k.sum(k.argument(OWN), k.product(self.thread, k.integer(own_bytes(shape))))
        first = k.sum(self.tile_shapes, k.integer(_TILE_SHAPES_BYTES))
        self.sums = [first, k.sum(first, k.integer(PANEL_BYTES))]
        expanded = k.sum(first, k.integer(2 * PANEL_BYTES))
        size = k.integer(max(expanded_bytes(product) for product in shape.products))
        self.expanded = [expanded, k.sum(expanded, size)]

    def emit(self) -> None:
        k, shape = self.k, self.shape
        q_size = shape.out.in_features
        self.embed()  # rows are shared as for the norm
        with tiles(k, self.form, self.tile_shapes), k.loop(k.integer(0), k.argument(NUM_LAYERS)) as layer:
            row = k.product(layer, k.integer(NUM_LAYER_FIELDS))
            self._norm_rows(self.field(row, INPUT_NORM), NORMED)
            self.barrier()
            self._product(shape.qkv, (row, QKV, QKV_BIAS), self._rows(NORMED, shape.hidden), HEADS)
            self.barrier()
            self.rotate_queries(row)
            self.write_cache(row)
            self.barrier()
            self._attend(layer)
            self.barrier()
            self._product(shape.out, (row, OUT, OUT_BIAS), self._rows(ATTENDED, q_size), HIDDEN)
            self.barrier()
            self._norm_rows(self.field(row, POST_NORM), NORMED)
            self.barrier()
            self._gated(row)
            self.barrier()
            self._product(shape.down, (row, DOWN, DOWN_BIAS), self._rows(ACTIVATED, shape.intermediate), HIDDEN)
            self.barrier()
        self._norm_rows(k.argument(FINAL_NORM), OUTPUT)

    def _rows(self, argument: int, size: int) -> Rows:
        """Rows of 16-bit numbers."""
        return Rows(self.k.argument(argument), self.k.integer(size * ELEMENT_BYTES))

    def _norm_rows(self, weight: Any, output: int) -> None:
        """This thread's rows of the hidden states, normed."""
        k, out = self.k, self._rows(output, self.shape.hidden)
        with self.shared(self.rows) as row:
            target = out.part(k, row, k.integer(0)).address
            k.invoke(self.norm, self.row_of(self.shared_rows(HIDDEN), row), weight, target)

    def _attend(self, layer: Any) -> None:
        k = self.k
        for function, arguments, stride in (
            (ATTENTION, ATTENTION_ARGUMENTS, ATTENTION_STRIDE),
            (CHUNKS, CHUNK_ARGUMENTS, CHUNK_STRIDE),
        ):
            address = k.argument(function)
            with k.when(k.builder.icmp_signed("!=", address, k.integer(0))):
                k.call_void(address, k.sum(k.argument(arguments), k.product(layer, k.argument(stride))))

    def _product(self, shape: ProductShape, fields: tuple[Any, int, int], x: Rows, output: int) -> None:
        """This thread's outputs; those of HIDDEN are added to what is there."""
        k = self.k
        row, weight, bias = fields
        outputs = Rows(k.argument(output), k.integer(self.stride_of(output) * FLOAT_BYTES))
        biases = self.field(row, bias)
        with self.drawn(k.integer(shape.padded_out // UNIT), row, weight) as unit:
            column = k.product(unit, k.integer(UNIT * FLOAT_BYTES))
            out, own_bias = outputs.part(k, k.integer(0), column), k.sum(biases, column)
            if output == HIDDEN:
                base = out
                with k.when(k.builder.icmp_signed("!=", biases, k.argument(ZEROS))):
                    self._add_bias(own_bias, out)
            else:
                base = Rows(own_bias, k.integer(0))
            source = self.products.unit(k, shape, self.field(row, weight), unit, self.expanded[0])
            self.products.emit(k, source, x, base, out, self.num_tiles)

    def _add_bias(self, bias: Any, out: Rows) -> None:
        k = self.k
        numbers = k.load(bias, k.integer(0), F32, UNIT)
        with k.loop(k.integer(0), self.rows) as row:
            place = out.part(k, row, k.integer(0)).address
            k.store(k.plus(k.load(place, k.integer(0), F32, UNIT), numbers), place, k.integer(0), F32, UNIT)

    def _gated(self, row: Any) -> None:
        """This thread's columns of `silu(gate) · up`."""
        k, shape = self.k, self.shape
        num_units = shape.intermediate // UNIT
        x, activated = self._rows(NORMED, shape.hidden), self._rows(ACTIVATED, shape.intermediate)
        weight, biases = self.field(row, GATE_UP_WEIGHT), self.field(row, GATE_UP_BIAS)
        with self.drawn(k.integer(num_units), row, GATE_UP_WEIGHT) as index:
            halves = [index, k.sum(index, k.integer(num_units))]
            units = [
                self.products.unit(k, shape.gate_up, weight, unit, expanded)
                for unit, expanded in zip(halves, self.expanded, strict=True)
            ]
            bases = [
                Rows(k.sum(biases, k.product(unit, k.integer(UNIT * FLOAT_BYTES))), k.integer(0)) for unit in halves
            ]
            sums = [Rows(address, k.integer(UNIT * FLOAT_BYTES)) for address in self.sums]
            column = k.product(index, k.integer(UNIT * ELEMENT_BYTES))
            out = activated.part(k, k.integer(0), column)

            def some(panel: Panel) -> None:
                for unit, base, part in zip(units, bases, sums, strict=True):
                    self.products.panel(k, unit, (panel.of(k, x), base, part), panel)
                self._activate(sums, panel.of(k, out), k.product(panel.size, k.integer(TILE)))

            for_panels(k, self.num_tiles, some)

    def _activate(self, sums: list[Rows], out: Rows, num_rows: Any) -> None:
        k = self.k
        with k.loop(k.integer(0), num_rows) as row:
            gates, ups = (rows.part(k, row, k.integer(0)).address for rows in sums)
            target = out.part(k, row, k.integer(0)).address
            for part in range(0, UNIT, LANES):
                place = k.integer(part)
                gate, up = k.load(gates, place, F32, LANES), k.load(ups, place, F32, LANES)
                k.store_floats(k.times(silu(k, gate), up), target, place, LANES, self.shape.kind)
