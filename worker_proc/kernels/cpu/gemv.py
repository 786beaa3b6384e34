"""Products of a few rows with a weight in oneDNN's blocks, as vector code for other kernels to call.

One weight is read once from memory for all rows and once only: a block lies in one piece, a thread's blocks lie one
after another, and lines are asked for some way ahead. Numbers are widened to float32 in registers and multiplied by
float32 inputs, so that nothing is rounded on the way: of two numbers side by side the second is a float32 once the
first is cut off, the first once it is shifted up. Outputs of a block lie side by side in a register: no sums across.

Bound: the memory. On 2 cores of an Emerald Rapids (25 GB/s) all products of SmolLM2-135M take 9.4 ms for 1 row (28
GB/s: a part comes from the cache), 11.7 ms for 2 to 4; oneDNN takes 13.3 ms for each of these.

A row's result does not depend on how many rows there are: every output adds its products up in the order of the inputs.
"""

import dataclasses
from typing import Any, Final

from folovllm.worker_proc.kernels.cpu.int4 import Int4Products
from folovllm.worker_proc.kernels.cpu.llvm import F32, Inner, Kernel
from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout
from folovllm.worker_proc.layers.int4_layout import PER_WORD, Int4Layout

ROW_COUNTS: Final = (1, 2, 4)  # there is code for; others take the next larger
LANES: Final = 16
_AHEAD_BYTES: Final = 4096  # prefetch distance: 1 row takes 11.7 ms at 512, 10.0 at 2,048, 9.4 at 4,096, 14.0 without
_UNROLL: Final = 4


ELEMENT_BYTES: Final = 2
FLOAT_BYTES: Final = 4

# What `build_product`'s function is given: int64 numbers, addresses in bytes.
(
    X,  # 16-bit [rows, inputs]
    ROWS,
    ROW_COUNT,  # rows, rounded up to what there is code for
    WEIGHT,
    BIAS,  # float32 [padded outputs]
    OWN,  # of each thread, float32 [ROW_COUNTS[-1], padded inputs]; the padding 0
    ZEROS,  # float32 [padded outputs]
    OUT,  # float32 [row count, padded outputs]
    THREAD_NUM,  # a function
    NUM_THREADS,
    DRAWN,  # a counter for each thread, see `Kernel.drawn`
) = range(11)
NUM_PRODUCT_ARGUMENTS: Final = 11


@dataclasses.dataclass(frozen=True)
class ProductShape:
    """What a product is compiled for.

    Attributes:
        out_features, in_features, padded_in, layout: as in `layers.blocked.BlockedWeight`.
    """

    out_features: int
    in_features: int
    padded_in: int
    layout: BlockLayout | Int4Layout

    @classmethod
    def of(cls, weight: BlockedWeight) -> "ProductShape":
        return cls(weight.out_features, weight.in_features, weight.padded_in, weight.layout)

    @property
    def num_blocks(self) -> int:
        return -(-self.out_features // self.layout.width)

    @property
    def padded_out(self) -> int:
        return self.num_blocks * self.layout.width

    @property
    def is_supported(self) -> bool:
        """Whether inputs are whole vectors, and a block whole turns of the loop."""
        turn = PER_WORD if isinstance(self.layout, Int4Layout) else _UNROLL * self.layout.group
        return self.in_features % LANES == 0 and self.padded_in % turn == 0


def row_count(rows: int) -> int:
    """The number of rows there is code for, that many or more."""
    return next(count for count in ROW_COUNTS if count >= rows)


def build_product(shape: ProductShape) -> Kernel:
    """`out = x · weightᵀ + bias` for a few rows; the arguments are named above."""
    k = Kernel("product")
    products = products_of(k, shape.layout)
    thread, num_threads = k.call_int(k.argument(THREAD_NUM)), k.argument(NUM_THREADS)
    own_size = ROW_COUNTS[-1] * shape.padded_in * FLOAT_BYTES
    own = k.sum(k.argument(OWN), k.product(thread, k.integer(own_size)))
    with k.loop(k.integer(0), k.argument(ROWS)) as row:
        source = k.sum(k.argument(X), k.product(row, k.integer(shape.in_features * ELEMENT_BYTES)))
        target = k.sum(own, k.product(row, k.integer(shape.padded_in * FLOAT_BYTES)))
        widen_row(k, source, target, shape.in_features, shape.layout.kind)
    with k.drawn(k.integer(shape.num_blocks), k.argument(DRAWN), (thread, num_threads)) as block:
        products.emit(
            k,
            weight=(k.argument(WEIGHT), k.argument(BIAS), k.integer(shape.padded_in)),
            inputs=(own, k.integer(shape.padded_in)),
            outputs=(k.argument(OUT), k.integer(shape.padded_out), k.argument(ZEROS), k.integer(0)),
            rows=k.argument(ROW_COUNT),
            blocks=(block, k.sum(block, k.integer(1))),
        )
    return k


def widen_row(k: Kernel, source: Any, target: Any, size: int, kind: str) -> None:
    """Copies `size` 16-bit numbers as float32."""
    with k.loop(k.integer(0), k.integer(size // LANES)) as part:
        place = k.product(part, k.integer(LANES))
        k.store(k.load_floats(source, place, LANES, kind), target, place, F32, LANES)


def products_of(kernel: Kernel, layout: BlockLayout | Int4Layout) -> "Products | Int4Products":
    """The functions for weights of a layout, in the module of `kernel`."""
    if isinstance(layout, Int4Layout):
        return Int4Products(kernel, layout)
    return Products(kernel, layout)


class Products:
    """The functions for weights of one layout, in the module of `kernel`."""

    def __init__(self, kernel: Kernel, layout: BlockLayout) -> None:
        self._layout = layout
        blocks = {rows: self._block(kernel, rows) for rows in ROW_COUNTS}
        self._ranges = self._range(kernel, blocks)

    def emit(self, kernel: Kernel, *, weight: Any, inputs: Any, outputs: Any, rows: Any, blocks: Any) -> None:
        """Outputs of some blocks: `out = x · weightᵀ + bias + base`.

        Args:
            kernel: whose code calls.
            weight: (address, address of the bias [padded outputs] as float32, padded inputs).
            inputs: (address of x, numbers from row to row): float32, the padding 0.
            outputs: (address of out, numbers from row to row, address of base, the same): float32, with room for
                padded outputs; `base` may be `out`.
            rows: how many of them, one of `ROW_COUNTS`.
            blocks: (first, end).
        """
        kernel.invoke(self._ranges, *weight, *inputs, *outputs, rows, *blocks)

    def _range(self, kernel: Kernel, blocks: dict[int, Inner]) -> Inner:
        f = kernel.inner(f"blocks_{self._name}", 12)
        weight, bias, padded_in, x, x_stride, out, out_stride, base, base_stride, rows, first, end = (
            f.argument(index) for index in range(12)
        )
        width = f.integer(self._layout.width)
        block_bytes = f.product(f.product(width, padded_in), f.integer(2))
        for count, block in blocks.items():
            with f.when(f.builder.icmp_signed("==", rows, f.integer(count))), f.loop(first, end) as index:
                place = f.product(f.product(index, width), f.integer(4))
                f.invoke(
                    block,
                    f.sum(weight, f.product(index, block_bytes)),
                    f.sum(bias, place),
                    padded_in,
                    *(x, x_stride),
                    *(f.sum(out, place), out_stride),
                    *(f.sum(base, place), base_stride),
                )
        return f.end()

    @property
    def _name(self) -> str:
        return f"{self._layout.width}x{self._layout.group}"

    def _block(self, kernel: Kernel, rows: int) -> Inner:
        """One block: `rows` inputs, `width` outputs each."""
        f = kernel.inner(f"block_{self._name}_{rows}", 9)
        weight, bias, padded_in, x, x_stride, out, out_stride, base, base_stride = (f.argument(i) for i in range(9))
        columns = range(self._layout.width // LANES)
        group, width = self._layout.group, self._layout.width
        zero = f.constant(0.0, LANES)
        sums = [[f.variable(zero) for _ in columns] for _ in range(rows)]
        step = _UNROLL * group
        with f.loop(f.integer(0), f.builder.sdiv(padded_in, f.integer(step))) as turn:
            for part in range(_UNROLL):
                k = f.sum(f.product(turn, f.integer(step)), f.integer(part * group))
                numbers = [
                    [f.load(x, f.sum(f.product(x_stride, f.integer(row)), k, f.integer(i)), F32) for i in range(group)]
                    for row in range(rows)
                ]
                line = f.sum(weight, f.product(k, f.integer(width * 2)))
                for column in columns:
                    f.prefetch(f.sum(line, f.integer(column * LANES * group * 2 + _AHEAD_BYTES)))
                    for i, vector in enumerate(self._load(f, line, column)):
                        for row in range(rows):
                            total = sums[row][column]
                            product = f.times(vector, f.spread(numbers[row][i], LANES))
                            f.set(total, f.plus(product, f.get(total)))
        for row in range(rows):
            for column in columns:
                place = f.integer(column * LANES)
                value = f.plus(f.load(bias, place, F32, LANES), f.get(sums[row][column]))
                start = f.sum(f.product(base_stride, f.integer(row)), place)
                value = f.plus(value, f.load(base, start, F32, LANES))
                f.store(value, out, f.sum(f.product(out_stride, f.integer(row)), place), F32, LANES)
        return f.end()

    def _load(self, f: Kernel, line: Any, column: int) -> list[Any]:
        """For each input of a group the weights of 16 outputs, as floats."""
        group, kind = self._layout.group, self._layout.kind
        if group == 1:
            return [f.load_floats(line, f.integer(column * LANES), LANES, kind)]
        if kind == "bfloat16":
            return list(f.load_pairs(line, f.integer(column * LANES), LANES))
        both = f.load_floats(line, f.integer(column * LANES * 2), 2 * LANES, kind)
        return [f.every_second(both, 2 * LANES, first) for first in (0, 1)]
