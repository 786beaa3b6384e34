"""All layers of a step of a few decoding requests in one call. Reference: the network's own `forward` (torch).

    embedding
    layer: norm, q k v │ head norm, rotation, K and V to the cache │ attention │ o, added
         │ norm, gate up │ SiLU │ down, added
    last norm

Every thread of the team runs the same function and does its share of each part; `│` is a `barrier`. What each needs
whole (a normed row, some kilobytes) each computes for itself. Between parts everything is float32, which torch's
operators would round to 16 bits each time.

Idea and bound: with one request a step is the reading of the weights (269 MB of SmolLM2-135M: 10 ms at 27 GB/s). As
some 450 operators of torch it takes 17 to 23 ms: each costs 3 to 8 µs, and its products do not reach the memory's rate.
The seven barriers of a layer cost about 1 µs each.

Layers differ only in addresses, which come from a table, so the code is as long as one layer and compiled once for a
network's shape.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.barrier import barrier_function
from folovllm.worker_proc.kernels.cpu.gemv import (
    ELEMENT_BYTES,
    FLOAT_BYTES,
    LANES,
    ROW_COUNTS,
    ProductShape,
    products_of,
    widen_row,
)
from folovllm.worker_proc.kernels.cpu.llvm import COUNTER_LINE, F32, I64, Inner, Kernel

# What a step's function is given: int64 numbers, addresses in bytes.
(
    ROWS,  # requests
    ROW_COUNT,  # the same, rounded up to what there is code for
    NUM_LAYERS,
    TOKEN_IDS,  # int64 [rows]
    POSITIONS,  # int64 [rows]
    SLOTS,  # int64 [rows]: where K and V go, block · block_size + offset
    EMBEDDING,
    COS,  # [positions, head_dim], see `layers.rotary.RotaryTable`
    SIN,
    LAYERS,  # the table below
    FINAL_NORM,
    HEAD_BYTES,  # from one KV head of the cache to the next; values begin after the keys of all heads
    ATTENTION,  # a function, called with the address of its arguments
    ATTENTION_ARGUMENTS,
    ATTENTION_STRIDE,  # bytes from one layer's to the next's
    HIDDEN,  # float32 [row count, hidden stride], and so on: see `StepSizes` (of many rows ACTIVATED is 16-bit)
    HEADS,
    GATE_UP,
    ACTIVATED,
    OWN,  # of each thread, `StepSizes.own` numbers (of many rows `wide_step.own_bytes`)
    QUERY,  # 16-bit [rows, query heads · head_dim]
    ATTENDED,
    ZEROS,  # float32, for products without a base
    OUTPUT,  # 16-bit [rows, hidden]
    THREAD_NUM,  # functions, as YIELD is
    NUM_THREADS,
    COUNTER,  # of arrivals at barriers
    YIELD,
    DRAWN,  # counters of what threads have drawn [layers, PRODUCTS_OF_LAYER, threads], see `Kernel.drawn`; 0 at first
    NORMED,  # for steps of many rows alone, as is what follows: 16-bit [row count, hidden]
    CHUNKS,  # a function as ATTENTION is, for prompt chunks; either may be 0
    CHUNK_ARGUMENTS,
    CHUNK_STRIDE,
) = range(33)
NUM_STEP_ARGUMENTS: Final = 33

# A layer's row in the table, int64: of each product the weight and its bias in float32, then norms and cache.
(
    QKV,
    QKV_BIAS,
    OUT,
    OUT_BIAS,
    GATE_UP_WEIGHT,
    GATE_UP_BIAS,
    DOWN,
    DOWN_BIAS,
    INPUT_NORM,
    POST_NORM,
    HEAD_NORM,
    CACHE,
) = range(12)
NUM_LAYER_FIELDS: Final = 12
PRODUCTS_OF_LAYER: Final = 4
_NORMED_STEP: Final = 2 * LANES * FLOAT_BYTES  # see `norm_function`


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What the function of a network is compiled for.

    Attributes:
        num_q_heads, num_kv_heads, head_dim: of the attention.
        head_norm: whether query and key heads are normed.
        eps: of all norms.
        kind: "bfloat16" or "float16": of weights, cache, and tables.
        qkv, out, gate_up, down: the products.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_norm: bool
    eps: float
    kind: str
    qkv: ProductShape
    out: ProductShape
    gate_up: ProductShape
    down: ProductShape

    @property
    def products(self) -> tuple[ProductShape, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    @property
    def hidden(self) -> int:
        return self.qkv.in_features

    @property
    def intermediate(self) -> int:
        return self.down.in_features

    @property
    def is_supported(self) -> bool:
        """Whether all sizes are whole vectors."""
        sizes = (self.hidden, self.intermediate, self.head_dim // 2)
        whole = all(size % LANES == 0 for size in sizes)
        return whole and all(product.is_supported for product in self.products)


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """Numbers from row to row of what is passed between parts, and how many a thread has for itself."""

    hidden: int
    heads: int
    gate_up: int
    activated: int
    normed: int
    widened: int

    @classmethod
    def of(cls, shape: StepShape) -> "StepSizes":
        return cls(
            hidden=max(shape.out.padded_out, shape.down.padded_out),
            heads=shape.qkv.padded_out,
            gate_up=shape.gate_up.padded_out,
            activated=shape.down.padded_in,
            normed=max(shape.qkv.padded_in, shape.gate_up.padded_in),
            widened=shape.out.padded_in,
        )

    @property
    def own(self) -> int:
        """Of one thread: normed rows, then widened ones."""
        return ROW_COUNTS[-1] * (self.normed + self.widened)


def build_step(shape: StepShape) -> Kernel:
    """The function of all layers; its arguments are named above."""
    kernel = Kernel("decode_step")
    _FewRows(kernel, shape).emit()
    return kernel


class StepCode:
    """What all steps have in common, whatever their rows."""

    def __init__(self, kernel: Kernel, shape: StepShape) -> None:
        self.k, self.shape, self.sizes = kernel, shape, StepSizes.of(shape)
        self._rotation = _rotate_function(kernel, shape)
        self._barrier = barrier_function(kernel)
        self.rows, self.row_count = kernel.argument(ROWS), kernel.argument(ROW_COUNT)
        self.thread = kernel.call_int(kernel.argument(THREAD_NUM))
        self.num_threads = kernel.argument(NUM_THREADS)

    def field(self, row: Any, field: int) -> Any:
        return self.k.load(self.k.argument(LAYERS), self.k.sum(row, self.k.integer(field)), I64)

    def barrier(self) -> None:
        self.k.invoke(self._barrier, *(self.k.argument(place) for place in (COUNTER, NUM_THREADS, YIELD)))

    @contextmanager
    def shared(self, count: Any) -> Iterator[Any]:
        """A loop over this thread's share of `count` pieces of work."""
        first, end = self.share(count)
        with self.k.loop(first, end) as index:
            yield index

    def share(self, count: Any) -> tuple[Any, Any]:
        return self.k.share(count, self.thread, self.num_threads)

    def share_of_rows(self) -> tuple[Any, Any]:
        """First and end of this thread's rows, where a row is a piece of work."""
        return self.share(self.rows)

    @contextmanager
    def drawn(self, count: Any, row: Any, weight: int) -> Iterator[Any]:
        """A loop over pieces of a product's work, named by its layer's row and its weight's field in the table."""
        k = self.k
        layer, product = k.builder.sdiv(row, k.integer(NUM_LAYER_FIELDS)), k.integer(weight // 2)
        place = k.product(k.sum(k.product(layer, k.integer(PRODUCTS_OF_LAYER)), product), self.num_threads)
        counters = k.sum(k.argument(DRAWN), k.product(place, k.integer(COUNTER_LINE)))
        with k.drawn(count, counters, (self.thread, self.num_threads)) as index:
            yield index

    def stride_of(self, argument: int) -> int:
        sizes = {
            HIDDEN: self.sizes.hidden,
            HEADS: self.sizes.heads,
            GATE_UP: self.sizes.gate_up,
            ACTIVATED: self.sizes.activated,
        }
        return sizes[argument]

    def shared_rows(self, argument: int) -> tuple[Any, Any]:
        return self.k.argument(argument), self.k.integer(self.stride_of(argument))

    def row_of(self, rows: tuple[Any, Any], row: Any) -> Any:
        """The address of a row of float32 numbers."""
        return self.k.sum(rows[0], self.k.product(self.k.product(row, rows[1]), self.k.integer(FLOAT_BYTES)))

    def embed(self) -> None:
        k = self.k
        with k.loop(*self.share_of_rows()) as row:
            token = k.load(k.argument(TOKEN_IDS), row, I64)
            source = k.sum(k.argument(EMBEDDING), k.product(token, k.integer(self.shape.hidden * ELEMENT_BYTES)))
            target = self.row_of(self.shared_rows(HIDDEN), row)
            widen_row(k, source, target, self.shape.hidden, self.shape.kind)

    def rotate_queries(self, row: Any) -> None:
        k, shape = self.k, self.shape
        heads = k.integer(shape.num_q_heads)
        with self.shared(k.product(self.rows, heads)) as item:
            request, head = k.builder.sdiv(item, heads), k.builder.srem(item, heads)
            target = k.product(item, k.integer(shape.head_dim * ELEMENT_BYTES))
            self.rotate(row, (request, head), self.head(request, head), k.sum(k.argument(QUERY), target))

    def rotate(self, row: Any, place: tuple[Any, Any], source: Any, target: Any) -> None:
        """One head, normed if heads are, at address `source`; `place`: its request and number."""
        k, dim = self.k, self.shape.head_dim
        request, head = place
        position = k.product(k.load(k.argument(POSITIONS), request, I64), k.integer(dim * ELEMENT_BYTES))
        norm = k.sum(self.field(row, HEAD_NORM), k.product(head, k.integer(dim * ELEMENT_BYTES)))
        tables = k.sum(k.argument(COS), position), k.sum(k.argument(SIN), position)
        k.invoke(self._rotation, source, norm, *tables, target)

    def head(self, request: Any, head: Any) -> Any:
        """The address of one head of the product of q, k and v."""
        place = self.k.product(head, self.k.integer(self.shape.head_dim * FLOAT_BYTES))
        return self.k.sum(self.row_of(self.shared_rows(HEADS), request), place)

    def write_cache(self, row: Any) -> None:
        k, shape = self.k, self.shape
        heads = k.integer(shape.num_kv_heads)
        with self.shared(k.product(self.rows, heads)) as item:
            request, head = k.builder.sdiv(item, heads), k.builder.srem(item, heads)
            number = k.sum(k.integer(shape.num_q_heads), head)
            self.rotate(row, (request, number), self.head(request, number), self.cached(row, request, head))
            number = k.sum(number, heads)
            self.store_value(self.head(request, number), self.cached(row, request, k.sum(head, heads)))

    def cached(self, row: Any, request: Any, head: Any) -> Any:
        """The address of a key in the cache; of a value if `head` counts on after the heads of keys."""
        k = self.k
        size = k.integer(self.shape.head_dim * ELEMENT_BYTES)
        place = k.product(k.load(k.argument(SLOTS), request, I64), size)
        return k.sum(self.field(row, CACHE), k.product(head, k.argument(HEAD_BYTES)), place)

    def store_value(self, source: Any, target: Any) -> None:
        k, dim = self.k, self.shape.head_dim
        k.store_floats(k.load(source, k.integer(0), F32, dim), target, k.integer(0), dim, self.shape.kind)


class _FewRows(StepCode):
    def __init__(self, kernel: Kernel, shape: StepShape) -> None:
        super().__init__(kernel, shape)
        layouts = dict.fromkeys(product.layout for product in shape.products)
        self.products = {layout: products_of(kernel, layout) for layout in layouts}
        self.norm = norm_function(kernel, shape.hidden, shape.eps, shape.kind)
        own = kernel.product(self.thread, kernel.integer(self.sizes.own * FLOAT_BYTES))
        self.normed = kernel.sum(kernel.argument(OWN), own)
        self.widened = kernel.sum(self.normed, kernel.integer(ROW_COUNTS[-1] * self.sizes.normed * FLOAT_BYTES))

    def emit(self) -> None:
        k = self.k
        self.embed()
        self.barrier()
        with k.loop(k.integer(0), k.argument(NUM_LAYERS)) as layer:
            row = k.product(layer, k.integer(NUM_LAYER_FIELDS))
            self._normed(self.field(row, INPUT_NORM))
            self._product(self.shape.qkv, (row, QKV), self._own_rows(self.normed, self.sizes.normed), HEADS)
            self.barrier()
            self.rotate_queries(row)
            self.write_cache(row)
            self.barrier()
            offset = k.product(layer, k.argument(ATTENTION_STRIDE))
            k.call_void(k.argument(ATTENTION), k.sum(k.argument(ATTENTION_ARGUMENTS), offset))
            self.barrier()
            self._widen()
            self._product(self.shape.out, (row, OUT), self._own_rows(self.widened, self.sizes.widened), HIDDEN)
            self.barrier()
            self._normed(self.field(row, POST_NORM))
            self._product(
                self.shape.gate_up, (row, GATE_UP_WEIGHT), self._own_rows(self.normed, self.sizes.normed), GATE_UP
            )
            self.barrier()
            self._activate()
            self.barrier()
            self._product(self.shape.down, (row, DOWN), self.shared_rows(ACTIVATED), HIDDEN)
            self.barrier()
        self._finish()

    def _own_rows(self, address: Any, stride: int) -> tuple[Any, Any]:
        return address, self.k.integer(stride)

    def _product(self, shape: ProductShape, field: tuple[Any, int], inputs: tuple[Any, Any], output: int) -> None:
        """This thread's outputs; those of HIDDEN are added to what is there."""
        k = self.k
        row, weight = field
        outputs = self.shared_rows(output)
        base = outputs if output == HIDDEN else (k.argument(ZEROS), k.integer(0))
        with self.drawn(k.integer(shape.num_blocks), row, weight) as block:
            self.products[shape.layout].emit(
                k,
                weight=(self.field(row, weight), self.field(row, weight + 1), k.integer(shape.padded_in)),
                inputs=inputs,
                outputs=(*outputs, *base),
                rows=self.row_count,
                blocks=(block, k.sum(block, k.integer(1))),
            )

    def _normed(self, weight: Any) -> None:
        k = self.k
        with k.loop(k.integer(0), self.rows) as row:
            target = self.row_of(self._own_rows(self.normed, self.sizes.normed), row)
            k.invoke(self.norm, self.row_of(self.shared_rows(HIDDEN), row), weight, target, k.integer(_NORMED_STEP))

    def _widen(self) -> None:
        """The attention's output as float32."""
        k, size = self.k, self.shape.out.in_features
        with k.loop(k.integer(0), self.rows) as row:
            source = k.sum(k.argument(ATTENDED), k.product(row, k.integer(size * ELEMENT_BYTES)))
            target = self.row_of(self._own_rows(self.widened, self.sizes.widened), row)
            widen_row(k, source, target, size, self.shape.kind)

    def _activate(self) -> None:
        """`silu(gate) · up`, 16 numbers at a time."""
        k, size = self.k, self.shape.intermediate
        parts = k.integer(size // LANES)
        with self.shared(k.product(self.rows, parts)) as item:
            request = k.builder.sdiv(item, parts)
            place = k.product(k.builder.srem(item, parts), k.integer(LANES))
            source = self.row_of(self.shared_rows(GATE_UP), request)
            gate = k.load(source, place, F32, LANES)
            up = k.load(source, k.sum(place, k.integer(size)), F32, LANES)
            target = self.row_of(self.shared_rows(ACTIVATED), request)
            k.store(k.times(silu(k, gate), up), target, place, F32, LANES)

    def _finish(self) -> None:
        k, hidden = self.k, self.shape.hidden
        with self.shared(self.rows) as row:
            normed = self.row_of(self._own_rows(self.normed, self.sizes.normed), row)
            hidden_row = self.row_of(self.shared_rows(HIDDEN), row)
            k.invoke(self.norm, hidden_row, k.argument(FINAL_NORM), normed, k.integer(_NORMED_STEP))
            target = k.sum(k.argument(OUTPUT), k.product(row, k.integer(hidden * ELEMENT_BYTES)))
            with k.loop(k.integer(0), k.integer(hidden // LANES)) as part:
                place = k.product(part, k.integer(LANES))
                k.store_floats(k.load(normed, place, F32, LANES), target, place, LANES, self.shape.kind)


def silu(k: Kernel, x: Any) -> Any:
    """x / (1 + e^-x), from e to the power of -|x|."""
    zero, one = k.constant(0.0, LANES), k.constant(1.0, LANES)
    negative = k.builder.fcmp_ordered("<", x, zero)
    small = k.exp(k.builder.select(negative, x, k.builder.fneg(x)), LANES)
    return k.builder.fdiv(k.times(x, k.builder.select(negative, small, one)), k.plus(one, small))


def norm_function(kernel: Kernel, size: int, eps: float, kind: str, out_kind: str = "float32") -> Inner:
    """`norm(x, weight, out, step)`: one row of float32 numbers normed, the weight of 16-bit numbers.

    32 numbers of what comes out lie together, and the next 32 begin `step` bytes later.
    """
    f = kernel.inner("norm", 4)
    x, weight, out, step = (f.argument(index) for index in range(4))
    parts = size // LANES
    at_once = next(count for count in (4, 3, 2, 1) if parts % count == 0)
    turns = f.integer(parts // at_once)

    def places(turn: Any) -> list[Any]:
        return [f.sum(f.product(turn, f.integer(at_once)), f.integer(each)) for each in range(at_once)]

    def squares(turn: Any, sums: Sequence[Any]) -> list[Any]:
        numbers = [f.load(x, f.product(part, f.integer(LANES)), F32, LANES) for part in places(turn)]
        return [f.plus(f.times(each, each), so_far) for each, so_far in zip(numbers, sums, strict=True)]

    totals = f.fold(turns, [f.constant(0.0, LANES)] * at_once, squares)
    total = functools.reduce(f.plus, totals)
    scale = f.spread(_inverse_root_mean(f, f.total(total, LANES), size, eps), LANES)
    with f.loop(f.integer(0), turns) as turn:
        for part in places(turn):
            place = f.product(part, f.integer(LANES))
            normed = f.times(f.load(x, place, F32, LANES), scale)
            target = f.sum(out, f.product(f.builder.lshr(part, f.integer(1)), step))
            half = f.product(f.builder.and_(part, f.integer(1)), f.integer(LANES))
            f.store_floats(f.times(normed, f.load_floats(weight, place, LANES, kind)), target, half, LANES, out_kind)
    return f.end()


def _rotate_function(kernel: Kernel, shape: StepShape) -> Inner:
    """`rotate(head, norm weight, cos, sin, out)`: one head of float32 numbers, `out` 16-bit."""
    dim, kind, half = shape.head_dim, shape.kind, shape.head_dim // 2
    f = kernel.inner("rotate", 5)
    head, weight, cos, sin, out = (f.argument(index) for index in range(5))
    halves = [f.load(head, f.integer(place), F32, half) for place in (0, half)]
    if shape.head_norm:
        squares = f.plus(f.times(halves[0], halves[0]), f.times(halves[1], halves[1]))
        scale = f.spread(_inverse_root_mean(f, f.total(squares, half), dim, shape.eps), half)
        for index, place in enumerate((0, half)):
            factor = f.load_floats(weight, f.integer(place), half, kind)
            halves[index] = f.times(f.times(halves[index], scale), factor)
    for index, place in enumerate((0, half)):
        turned = f.times(halves[1 - index], f.load_floats(sin, f.integer(place), half, kind))
        kept = f.times(halves[index], f.load_floats(cos, f.integer(place), half, kind))
        f.store_floats(f.plus(kept, turned), out, f.integer(place), half, kind)
    return f.end()


def _inverse_root_mean(f: Kernel, total: Any, size: int, eps: float) -> Any:
    mean = f.builder.fdiv(total, ir.Constant(F32, float(size)))
    return f.builder.fdiv(ir.Constant(F32, 1.0), f.root(f.builder.fadd(mean, ir.Constant(F32, eps))))
