"""Products with 4-bit weights, as vector code. Reference: `quantization.storage.Quantized.dequantize` and a product.

A weight lies in blocks of 16 outputs, one after another. In a block come words, int32 [inputs / 8, 16]: word (v, n)
holds the numbers of inputs 8 v to 8 v + 7 of output n, the first in its lowest bits; then float16 scales [groups, 16];
then, if it is asymmetric, zeros [groups, 16] as float16, minus 8. So 16 outputs lie side by side in a register, a block
is read from its beginning to its end, and no sums across registers are needed.

A number from 0 to 15 becomes a float in two steps: a shift, and a look into a table of 16 floats in a register
(`vpermps`, which takes the lowest four bits of each index, so nothing has to be masked). Then one multiplication and
addition for each row. The scale is applied once a group, to its sum: in float32 nothing is rounded on the way.

Bound: for one row the memory, half a byte a weight; 1.5 cycles for 16 weights and one row on a processor with two
512-bit units, so from about 4 rows on the arithmetic. Many rows are served by `Expansion`: the weight as bfloat16 in
the very blocks that oneDNN's product reads, which stay in the cache between the two.
"""

from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.llvm import F32, HALF, I32, Inner, Kernel
from folovllm.worker_proc.layers.blocked import BlockLayout
from folovllm.worker_proc.layers.int4_layout import LANES, MIDDLE, PER_WORD, SCALE_BYTES, WORD_BYTES, Int4Layout

CHUNKS: Final = (4, 2, 1)  # rows that are computed together
_PARTS: Final = 4  # sums that do not wait for each other; as many for any number of rows, so that these come out equal
_AHEAD_BYTES: Final = 2048

# What `build_product`'s function is given: int64 numbers, addresses in bytes.
X, ROWS, WEIGHT, BIAS, PADDED_IN, NUM_BLOCKS, OUT, OUT_STRIDE, ZEROS, THREAD_NUM, NUM_THREADS = range(11)
NUM_PRODUCT_ARGUMENTS: Final = 11
# The same for `build_expansion`.
SOURCE, TARGET, INPUTS, BLOCKS, TARGET_IN, EXPANSION_THREAD_NUM, EXPANSION_NUM_THREADS = range(7)
NUM_EXPANSION_ARGUMENTS: Final = 7


class Int4Products:
    """The functions for weights of one layout, in the module of `kernel`; see `gemv.Products`."""

    def __init__(self, kernel: Kernel, layout: Int4Layout) -> None:
        self._layout = layout
        self._blocks = {rows: self._block(kernel, rows) for rows in CHUNKS}

    def emit(self, kernel: Kernel, *, weight: Any, inputs: Any, outputs: Any, rows: Any, blocks: Any) -> None:
        """Outputs of some blocks: `out = x · weightᵀ + bias + base`; arguments as of `gemv.Products.emit`.

        `rows` may be any number. They are taken in chunks, block by block, so that a block is read from memory once.
        """
        k = kernel
        address, bias, padded_in = weight
        (x, x_stride), (out, out_stride, base, base_stride) = inputs, outputs
        block_bytes = _Block(k, self._layout, padded_in).num_bytes
        with k.loop(*blocks) as index:
            place = k.product(index, k.integer(LANES * 4))
            source = k.sum(address, k.product(index, block_bytes))
            done = k.integer(0)
            for chunk, block in self._blocks.items():
                left = k.builder.sub(rows, done)
                turns = k.builder.sdiv(left, k.integer(chunk))
                with k.loop(k.integer(0), turns) as turn:
                    row = k.sum(done, k.product(turn, k.integer(chunk)))
                    k.invoke(
                        block,
                        *(source, k.sum(bias, place), padded_in),
                        *(_row(k, x, x_stride, row), x_stride),
                        *(k.sum(_row(k, out, out_stride, row), place), out_stride),
                        *(k.sum(_row(k, base, base_stride, row), place), base_stride),
                    )
                done = k.sum(done, k.product(turns, k.integer(chunk)))

    def _block(self, kernel: Kernel, rows: int) -> Inner:
        """One block of weights and `rows` rows of inputs."""
        layout = self._layout
        f = kernel.inner(f"int4_{layout.group_size}_{'z' if layout.asymmetric else 's'}_{rows}", 9)
        weight, bias, padded_in, x, x_stride, out, out_stride, base, base_stride = (f.argument(i) for i in range(9))
        block = _Block(f, layout, padded_in)
        zero = f.constant(0.0, LANES)
        totals = [f.variable(zero) for _ in range(rows)]
        sums = [[f.variable(zero) for _ in range(_PARTS)] for _ in range(rows)]
        with f.loop(f.integer(0), block.num_groups) as group:
            zeros = block.zeros(weight, group)
            with f.loop(*block.words_of(group)) as word:
                f.prefetch(f.sum(weight, f.product(word, f.integer(LANES * WORD_BYTES)), f.integer(_AHEAD_BYTES)))
                for place, numbers in enumerate(block.numbers(weight, word, zeros)):
                    k = f.sum(f.product(word, f.integer(PER_WORD)), f.integer(place))
                    for row in range(rows):
                        number = f.load(x, f.sum(f.product(x_stride, f.integer(row)), k), F32)
                        part = sums[row][place % _PARTS]
                        f.set(part, f.plus(f.times(numbers, f.spread(number, LANES)), f.get(part)))
            scale = block.scale(weight, group)
            for row in range(rows):
                together = f.get(sums[row][0])
                for part in sums[row][1:]:
                    together = f.plus(together, f.get(part))
                f.set(totals[row], f.plus(f.times(together, scale), f.get(totals[row])))
                for part in sums[row]:
                    f.set(part, zero)
        for row in range(rows):
            value = f.plus(f.load(bias, f.integer(0), F32, LANES), f.get(totals[row]))
            value = f.plus(value, f.load(base, f.product(base_stride, f.integer(row)), F32, LANES))
            f.store(value, out, f.product(out_stride, f.integer(row)), F32, LANES)
        return f.end()


class _Block:
    """Where things lie in a block of weights, and its numbers as floats."""

    def __init__(self, f: Kernel, layout: Int4Layout, inputs: Any) -> None:
        self._f, self._layout = f, layout
        self._group_words = f.integer(layout.group_size // PER_WORD)
        self._num_words = f.builder.sdiv(inputs, f.integer(PER_WORD))
        more = f.integer(layout.group_size // PER_WORD - 1)
        self.num_groups = f.builder.sdiv(f.sum(self._num_words, more), self._group_words)
        self._scales = f.product(self._num_words, f.integer(LANES * WORD_BYTES))
        self._scale_bytes = f.product(self.num_groups, f.integer(LANES * SCALE_BYTES))
        both = f.sum(self._scales, self._scale_bytes)
        self.num_bytes = f.sum(both, self._scale_bytes) if layout.asymmetric else both
        self._table = ir.Constant(
            ir.VectorType(F32, LANES), [ir.Constant(F32, float(number - MIDDLE)) for number in range(LANES)]
        )
        self._looks_up = can_look_up()

    def words_of(self, group: Any) -> tuple[Any, Any]:
        f = self._f
        first = f.product(group, self._group_words)
        end = f.sum(first, self._group_words)
        within = f.builder.icmp_signed("<", end, self._num_words)
        return first, f.builder.select(within, end, self._num_words)

    def scale(self, weight: Any, group: Any) -> Any:
        return self._halves(self._f.sum(weight, self._scales), group)

    def zeros(self, weight: Any, group: Any) -> Any | None:
        """The group's zeros minus 8, if it has some."""
        if not self._layout.asymmetric:
            return None
        return self._halves(self._f.sum(weight, self._scales, self._scale_bytes), group)

    def _halves(self, address: Any, group: Any) -> Any:
        f = self._f
        stored = f.load(address, f.product(group, f.integer(LANES)), HALF, LANES)
        return f.builder.fpext(stored, ir.VectorType(F32, LANES))

    def numbers(self, weight: Any, word: Any, zeros: Any | None) -> list[Any]:
        """Eight vectors, those of the word's inputs: numbers minus their zeros."""
        f = self._f
        words = f.load(weight, f.product(word, f.integer(LANES)), I32, LANES)
        found = []
        for place in range(PER_WORD):
            shifted = f.builder.lshr(words, _all(4 * place)) if place else words
            number = self._looked_up(shifted) if self._looks_up else self._computed(shifted)
            found.append(number if zeros is None else f.builder.fsub(number, zeros))
        return found

    def _looked_up(self, words: Any) -> Any:
        kind = ir.VectorType(F32, LANES)
        return self._f.call("llvm.x86.avx512.permvar.sf.512", kind, self._table, words)

    def _computed(self, words: Any) -> Any:
        builder = self._f.builder
        number = builder.sub(builder.and_(words, _all(PER_WORD * 2 - 1)), _all(MIDDLE))
        return builder.sitofp(number, ir.VectorType(F32, LANES))


def can_look_up() -> bool:
    """Whether the processor can look 16 floats up in a register."""
    return bool(llvm.get_host_cpu_features().get("avx512f", False))


def build_product(layout: Int4Layout) -> Kernel:
    """`out = x · weightᵀ + bias` for float32 rows; the arguments are named above."""
    k = Kernel("int4_product")
    products = Int4Products(k, layout)
    thread = k.call_int(k.argument(THREAD_NUM))
    products.emit(
        k,
        weight=(k.argument(WEIGHT), k.argument(BIAS), k.argument(PADDED_IN)),
        inputs=(k.argument(X), k.argument(PADDED_IN)),
        outputs=(k.argument(OUT), k.argument(OUT_STRIDE), k.argument(ZEROS), k.integer(0)),
        rows=k.argument(ROWS),
        blocks=k.share(k.argument(NUM_BLOCKS), thread, k.argument(NUM_THREADS)),
    )
    return k


def build_expansion(layout: Int4Layout, target: BlockLayout) -> Kernel:
    """The weight as bfloat16 in blocks of another layout; the arguments are named above."""
    k = Kernel("int4_expansion")
    expansion = expansion_function(k, layout, target)
    thread = k.call_int(k.argument(EXPANSION_THREAD_NUM))
    inputs = k.argument(INPUTS)
    block_bytes = _Block(k, layout, inputs).num_bytes
    per_target = target.width // LANES
    target_bytes = k.product(k.argument(TARGET_IN), k.integer(target.width * 2))
    with k.loop(*k.share(k.argument(BLOCKS), thread, k.argument(EXPANSION_NUM_THREADS))) as index:
        source = k.sum(k.argument(SOURCE), k.product(index, block_bytes))
        whole = k.builder.sdiv(index, k.integer(per_target))
        column = k.builder.srem(index, k.integer(per_target))
        corner = k.sum(
            k.argument(TARGET), k.product(whole, target_bytes), k.product(column, k.integer(LANES * target.group * 2))
        )
        k.invoke(expansion, source, corner, inputs)
    return k


def expansion_function(kernel: Kernel, layout: Int4Layout, target: BlockLayout) -> Inner:
    """`expand(block, corner, inputs)`: one block as bfloat16 among others of another layout, from `corner` on."""
    k = kernel.inner(f"expand_{layout.group_size}_{'z' if layout.asymmetric else 's'}", 3)
    source, corner, inputs = (k.argument(index) for index in range(3))
    block = _Block(k, layout, inputs)
    with k.loop(k.integer(0), block.num_groups) as group:
        zeros, scale = block.zeros(source, group), block.scale(source, group)
        with k.loop(*block.words_of(group)) as word:
            k.prefetch(k.sum(source, k.product(word, k.integer(LANES * WORD_BYTES)), k.integer(_AHEAD_BYTES)))
            numbers = [k.times(number, scale) for number in block.numbers(source, word, zeros)]
            first = k.product(word, k.integer(PER_WORD * target.width * 2))
            for place in range(0, PER_WORD, target.group):
                line = k.sum(corner, first, k.integer(place * target.width * 2))
                _store_side_by_side(k, numbers[place : place + target.group], line)
    return k.end()


def _store_side_by_side(k: Kernel, numbers: list[Any], line: Any) -> None:
    """One or two vectors of floats as bfloat16; of two, those at the same place next to each other."""
    if len(numbers) == 1:
        k.store_floats(numbers[0], line, k.integer(0), LANES, "bfloat16")
        return
    low, high = (_rounded(k, number) for number in numbers)
    pair = k.builder.or_(k.builder.lshr(low, _all(16)), k.builder.and_(high, _all(0xFFFF0000)))
    k.store(pair, line, k.integer(0), I32, LANES)


def _rounded(k: Kernel, number: Any) -> Any:
    """Bits of a float whose upper half is the bfloat16 nearest to it; of two as near the larger one."""
    return k.builder.add(k.builder.bitcast(number, ir.VectorType(I32, LANES)), _all(0x8000))


def _row(k: Kernel, address: Any, stride: Any, row: Any) -> Any:
    return k.sum(address, k.product(k.product(row, stride), k.integer(4)))


def _all(value: int) -> Any:
    return ir.Constant(ir.VectorType(I32, LANES), [ir.Constant(I32, value)] * LANES)
