"""The two products of chunk attention, in the three forms that processors offer for 16-bit numbers.

All forms hold scores, weights and outputs transposed: sixteen query rows are the lanes of a vector, keys (or the
numbers of a head) follow one another. Then keys need no packing for the scores, largest scores and sums over keys are
found without a sum across lanes, and one row of weights scales a whole column of values.

    AMX     tiles of 16 x 32 bf16 numbers: 16 keys straight from their block times 16 packed queries
    PAIRS   `vdpbf16ps`: two neighbouring numbers of a key, spread over the lanes, times pairs of queries (AVX512-BF16)
    FLOATS  everything widened to float32 first: float16 anywhere, and bf16 without the others (AVX2, AVX-512)

Which is taken: AMX where there is any; pairs on AMD's Zen 4 and 5, which start as many `vdpbf16ps` in a cycle as
products of floats (by its manuals: not measured here); floats elsewhere, for Intel's processors start one
`vdpbf16ps` where they start four fused products. Milliseconds of a layer's attention, one thread of a Xeon of 2023 with
AMX, least of 12, 9/3 heads of 64 ("torch": gather and scaled_dot_product_attention, with AMX, and kept to AVX-512 or
AVX2 by MKL_ENABLE_INSTRUCTIONS and the like; AVX2's floats are a kernel of their own):

    new tokens × context    torch AMX   AVX-512    AVX2  |  AMX  PAIRS  FLOATS   of AVX2
       16 × 0                    0.07      0.13    0.08  | 0.03   0.04    0.03      0.05
       16 × 1,000                0.50      1.15    1.12  | 0.17   0.51    0.33      0.78
       16 × 3,000                1.40      2.29    3.20  | 0.42   1.53    1.02      2.22
       48 × 3,000                3.16     11.78    8.16  | 1.05   4.49    2.80      6.00
      128 × 1,000                2.61      4.76    7.81  | 1.04   4.21    2.54      5.30
    1,024 × 0                    8.03     35.84   44.06  | 4.11  16.81   10.15     29.03

In float16 floats take 0.5 to 0.6 times as long as torch. Tiles of 16 to 256 rows with two batched products in torch are
slower than scaled_dot_product_attention in bf16 and float32 alike (48 × 3,000 in float32: 5.4 to 6.7 against 4.0), so
torch's path stays with that.
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.llvm import BF16, F32, I8, I16, I32, I64, Kernel

LANES: Final = 16  # query rows of one vector
KEYS: Final = 128  # keys that are weighed at once
SUB: Final = 16  # of these, so many lie one after another in any case: the least block size
PAIRED: Final = 32  # keys that are multiplied with weights at once
VECTOR_BYTES: Final = LANES * 4
_UNROLLED: Final = 4  # steps of an inner loop that are written one after another
_FLOATS: Final = ir.VectorType(F32, LANES)
_WORDS: Final = ir.VectorType(I32, LANES)
_PAIRS: Final = ir.VectorType(BF16, 2 * LANES)


class Form(enum.Enum):
    """How products are computed."""

    AMX = "amx"
    PAIRS = "pairs"
    FLOATS = "floats"


def best_form(kind: str, processor: str, features: Mapping[str, bool]) -> Form:
    """The fastest form for numbers of this kind on a processor of this name with these features (LLVM's names)."""
    if kind == "bfloat16" and features.get("amx-bf16"):
        return Form.AMX
    if kind == "bfloat16" and features.get("avx512bf16") and processor.startswith("znver"):
        return Form.PAIRS
    return Form.FLOATS


@dataclasses.dataclass(frozen=True)
class Areas:
    """Where a thread keeps what; addresses in bytes.

    Attributes:
        queries: [vectors, numbers of a head, 16] (pairs of numbers in one word, or floats).
        scores: [2 vectors, KEYS, 16] float32.
        weights: [2 vectors, KEYS / 2, 16] pairs; the scores' own place for floats.
        outputs: [vectors, numbers of a head, 16] float32.
        keys: [KEYS, numbers] float32, for floats alone.
        values: packed as the form needs them.
        subs: [2 · KEYS / 16] int64, where 16 keys each begin: elements within their head; then those of the next KEYS.
    """

    queries: Any
    scores: Any
    weights: Any
    outputs: Any
    keys: Any
    values: Any
    subs: Any


class Products(Protocol):
    """A form's products. All methods emit code."""

    def pack_queries(self, vector: Any, rows: Sequence[Any], address: Any) -> None:
        """Packs sixteen rows, which begin at these elements of `address`, as query vector number `vector`."""

    def pack_block(self, cache: tuple[Any, Any], num_subs: Any, num_valid: Any) -> None:
        """Packs keys and values at addresses `cache`; values from `num_valid` on, which may be anything, count as 0."""

    def scores(self, first: Any, width: int, key_address: Any, num_subs: Any) -> None:
        """Scores of `width` query vectors from `first` on with the block's keys."""

    def store_weights(self, vector: int, pair: Any, weights: Sequence[Any]) -> None:
        """Keeps the weights of a pair of keys for the strip's vector number `vector`."""

    def add_values(self, first: Any, width: int, num_paired: Any) -> None:
        """Adds the block's weighted values to the outputs of `width` vectors from `first` on."""


def make_products(form: Form, kernel: Kernel, areas: Areas, head_dim: int, kind: str, *, wide: bool) -> Products:
    """`wide`: there are 32 vector registers (AVX-512)."""
    if form is Form.AMX:
        return _Amx(kernel, areas, head_dim)
    if form is Form.PAIRS:
        return _Pairs(kernel, areas, head_dim)
    return _Floats(kernel, areas, head_dim, kind, wide=wide)


class _Packed:
    """What AMX and pairs have in common: words of two 16-bit numbers."""

    def __init__(self, kernel: Kernel, areas: Areas, head_dim: int) -> None:
        self.k, self.areas, self.dim = kernel, areas, head_dim

    def pack_queries(self, vector: Any, rows: Sequence[Any], address: Any) -> None:
        k = self.k
        start = k.product(vector, k.integer(self.dim // 2 * LANES))
        for part in range(self.dim // (2 * LANES)):
            offsets = [k.sum(row, k.integer(part * 2 * LANES)) for row in rows]
            words = [k.builder.bitcast(k.load(address, each, I16, 2 * LANES), _WORDS) for each in offsets]
            for place, column in enumerate(k.transposed(words)):
                at = k.sum(start, k.integer((part * LANES + place) * LANES))
                k.store(column, self.areas.queries, at, I32, LANES)

    def store_weights(self, vector: int, pair: Any, weights: Sequence[Any]) -> None:
        """Rounded to bf16 (half away from zero: weights are not negative), the second key in the upper half."""
        k = self.k
        half, upper, sixteen = (_words(value) for value in (0x8000, 0xFFFF0000, 16))
        low, high = (k.builder.add(k.builder.bitcast(each, _WORDS), half) for each in weights)
        word = k.builder.or_(k.builder.lshr(low, sixteen), k.builder.and_(high, upper))
        k.store(word, self.areas.weights, self.weight_place(vector, pair), I32, LANES)

    def weight_place(self, vector: int, pair: Any) -> Any:
        return self.k.sum(self.k.integer(vector * KEYS // 2 * LANES), self.k.product(pair, self.k.integer(LANES)))

    def pack_block(self, cache: tuple[Any, Any], num_subs: Any, num_valid: Any) -> None:
        """Values in pairs of keys; keys are read where they are."""
        k = self.k
        num_whole = k.builder.lshr(num_valid, k.integer(5))
        with k.loop(k.integer(0), num_whole) as paired:
            for sub in (0, 1):
                self.fetch_ahead(cache, k.sum(k.product(paired, k.integer(2)), k.integer(sub)))
            self.pack_paired(cache[1], paired, None)
        with k.loop(num_whole, k.builder.lshr(k.sum(num_subs, k.integer(1)), k.integer(1))) as paired:  # once at most
            self.pack_paired(cache[1], paired, num_valid)

    def fetch_ahead(self, cache: tuple[Any, Any], sub: Any) -> None:
        """Asks for 16 keys and values of the next block (16 new tokens over 3,000: 0.45 instead of 0.49 ms a layer)."""
        k = self.k
        start = k.load(self.areas.subs, k.sum(sub, k.integer(KEYS // SUB)), I64)
        for address in cache:
            base = k.sum(address, k.product(start, k.integer(2)))
            for line in range(0, SUB * self.dim * 2, 64):
                k.prefetch(k.sum(base, k.integer(line)))

    def pack_paired(self, values: Any, paired: Any, num_valid: Any | None) -> None:
        """32 keys; `num_valid` None: all of them are valid."""
        k = self.k
        bases = [k.load(self.areas.subs, k.sum(k.product(paired, k.integer(2)), k.integer(sub)), I64) for sub in (0, 1)]
        rows = [k.sum(bases[key // SUB], k.integer(key % SUB * self.dim)) for key in range(PAIRED)]
        valid = []
        if num_valid is not None:
            keys = [k.sum(k.product(paired, k.integer(PAIRED)), k.integer(key)) for key in range(PAIRED)]
            valid = [k.builder.icmp_signed("<", key, num_valid) for key in keys]
            rows = [k.builder.select(inside, row, bases[0]) for inside, row in zip(valid, rows, strict=True)]
        nothing = ir.Constant(ir.VectorType(I16, LANES), [ir.Constant(I16, 0)] * LANES)
        with k.loop(k.integer(0), k.integer(self.dim // LANES)) as part:
            start = k.product(part, k.integer(LANES))
            loaded = [k.load(values, k.sum(row, start), I16, LANES) for row in rows]
            if num_valid is not None:
                loaded = [k.builder.select(inside, row, nothing) for inside, row in zip(valid, loaded, strict=True)]
            pairs = [k.interleaved(loaded[key], loaded[key + 1], LANES) for key in range(0, PAIRED, 2)]
            self.store_values(paired, start, [k.builder.bitcast(pair, _WORDS) for pair in pairs])

    def store_values(self, paired: Any, start: Any, pairs: Sequence[Any]) -> None:
        """Keeps 16 pairs of keys, of each the sixteen numbers from `start` on."""
        raise NotImplementedError


class _Amx(_Packed):
    """Packed values: [KEYS / 32, numbers, 16 pairs of keys]."""

    def store_values(self, paired: Any, start: Any, pairs: Sequence[Any]) -> None:
        k = self.k
        place = k.product(k.sum(k.product(paired, k.integer(self.dim)), start), k.integer(LANES))
        for number, column in enumerate(k.transposed(pairs)):
            k.store(column, self.areas.values, k.sum(place, k.integer(number * LANES)), I32, LANES)

    def scores(self, first: Any, width: int, key_address: Any, num_subs: Any) -> None:
        k, steps = self.k, self.dim // 32
        query_bytes = k.product(first, k.integer(self.dim // 2 * VECTOR_BYTES))
        queries = k.sum(self.areas.queries, query_bytes)
        parts = [(step, vector) for step in range(steps) for vector in range(width)]
        stay = len(parts) <= 4  # tiles 4 to 7 hold all queries
        if stay:
            for tile, (step, vector) in enumerate(parts):
                self.load_tile(4 + tile, k.sum(queries, k.integer(self.query_bytes(step, vector))), VECTOR_BYTES)
        with k.loop(k.integer(0), num_subs) as sub:
            keys = k.sum(key_address, k.product(k.load(self.areas.subs, sub, I64), k.integer(2)))
            for vector in range(width):
                k.call("llvm.x86.tilezero", ir.VoidType(), _i8(vector))
            for step in range(steps):
                self.load_tile(2, k.sum(keys, k.integer(step * 64)), self.dim * 2)
                for vector in range(width):
                    tile = 4 + step * width + vector if stay else 4 + vector
                    if not stay:
                        at = k.sum(queries, k.integer(self.query_bytes(step, vector)))
                        self.load_tile(tile, at, VECTOR_BYTES)
                    self.multiply(vector, 2, tile)
            for vector in range(width):
                place = k.sum(k.product(sub, k.integer(SUB * VECTOR_BYTES)), k.integer(vector * KEYS * VECTOR_BYTES))
                self.store_tile(vector, k.sum(self.areas.scores, place))

    def query_bytes(self, step: int, vector: int) -> int:
        return (vector * self.dim // 2 + step * LANES) * VECTOR_BYTES

    def add_values(self, first: Any, width: int, num_paired: Any) -> None:
        k = self.k
        with k.loop(k.integer(0), k.integer(self.dim // 32)) as part:
            numbers = [k.sum(k.product(part, k.integer(32)), k.integer(16 * each)) for each in (0, 1)]
            sums = {}
            for row, number in enumerate(numbers):
                for vector in range(width):
                    at = k.sum(k.product(k.sum(first, k.integer(vector)), k.integer(self.dim)), number)
                    sums[2 * row + vector] = k.sum(self.areas.outputs, k.product(at, k.integer(VECTOR_BYTES)))
            for tile, address in sums.items():
                self.load_tile(tile, address, VECTOR_BYTES)
            with k.loop(k.integer(0), num_paired) as paired:
                for row, number in enumerate(numbers):
                    at = k.product(k.sum(k.product(paired, k.integer(self.dim)), number), k.integer(VECTOR_BYTES))
                    self.load_tile(4 + row, k.sum(self.areas.values, at), VECTOR_BYTES)
                for vector in range(width):
                    at = k.product(self.weight_place(vector, k.product(paired, k.integer(LANES))), k.integer(4))
                    self.load_tile(6 + vector, k.sum(self.areas.weights, at), VECTOR_BYTES)
                for row in (0, 1):
                    for vector in range(width):
                        self.multiply(2 * row + vector, 4 + row, 6 + vector)
            for tile, address in sums.items():
                self.store_tile(tile, address)

    def load_tile(self, tile: int, address: Any, stride: int) -> None:
        self.k.call("llvm.x86.tileloadd64", ir.VoidType(), _i8(tile), self.pointer(address), self.k.integer(stride))

    def store_tile(self, tile: int, address: Any) -> None:
        stride = self.k.integer(VECTOR_BYTES)
        self.k.call("llvm.x86.tilestored64", ir.VoidType(), _i8(tile), self.pointer(address), stride)

    def multiply(self, sums: int, rows: int, columns: int) -> None:
        self.k.call("llvm.x86.tdpbf16ps", ir.VoidType(), _i8(sums), _i8(rows), _i8(columns))

    def pointer(self, address: Any) -> Any:
        return self.k.builder.inttoptr(address, I8.as_pointer())


class _Spread(Protocol):
    """Where one number (or word of two) at a time is spread over the lanes and multiplied with sixteen rows."""

    k: Kernel
    areas: Areas
    dim: int
    at_once: int  # keys, or numbers of a head, whose sums stay in registers
    per_word: int  # numbers in what is spread

    def key(self, cached: Any, group: Any, /) -> tuple[Any, Any]:
        """Address, and offset in words, of the `at_once` keys of number `group`; they lie one after another."""

    def word(self, address: Any, offset: Any) -> Any:
        """One word for all lanes."""

    def row(self, address: Any, offset: Any) -> Any:
        """Sixteen words."""

    def plus(self, total: Any, left: Any, right: Any) -> Any:
        """The total and the product of two vectors of words."""

    def weights(self) -> Any:
        """Where weights are."""

    def scores(self, first: Any, width: int, key_address: Any, num_subs: Any) -> None:
        k, words, at_once = self.k, self.dim // self.per_word, self.at_once
        with k.loop(k.integer(0), k.product(num_subs, k.integer(SUB // at_once))) as group:
            keys, start = self.key(key_address, group)

            def step(index: Any, sums: Sequence[Any]) -> list[Any]:
                found = list(sums)
                for each in range(_UNROLLED):
                    number = k.sum(k.product(index, k.integer(_UNROLLED)), k.integer(each))
                    queries = [self.query(first, vector, number) for vector in range(width)]
                    for key in range(at_once):
                        one = self.word(keys, k.sum(start, number, k.integer(key * words)))
                        for at, query in enumerate(queries, key * width):
                            found[at] = self.plus(found[at], one, query)
                return found

            zeros = [k.constant(0.0, LANES)] * (at_once * width)
            for at, total in enumerate(k.fold(k.integer(words // _UNROLLED), zeros, step)):
                key, vector = divmod(at, width)
                place = k.sum(k.product(group, k.integer(at_once * LANES)), k.integer((vector * KEYS + key) * LANES))
                k.store(total, self.areas.scores, place, F32, LANES)

    def query(self, first: Any, vector: int, number: Any) -> Any:
        k = self.k
        row = k.sum(k.product(k.sum(first, k.integer(vector)), k.integer(self.dim // self.per_word)), number)
        return self.row(self.areas.queries, k.product(row, k.integer(LANES)))

    def add_values(self, first: Any, width: int, num_paired: Any) -> None:
        k, at_once, words = self.k, self.at_once, KEYS // self.per_word
        with k.loop(k.integer(0), k.integer(self.dim // at_once)) as part:
            start = k.product(part, k.integer(at_once))
            eight, within = k.builder.and_(start, k.integer(-8)), k.builder.and_(start, k.integer(7))
            values = k.sum(k.product(eight, k.integer(words)), within)

            def step(index: Any, sums: Sequence[Any]) -> list[Any]:
                found = list(sums)
                for each in range(_UNROLLED):
                    key = k.sum(k.product(index, k.integer(_UNROLLED)), k.integer(each))
                    at = k.product(key, k.integer(LANES))
                    rows = [
                        self.row(self.weights(), k.sum(at, k.integer(vector * words * LANES)))
                        for vector in range(width)
                    ]
                    for number in range(at_once):
                        offset = k.sum(values, k.product(key, k.integer(8)), k.integer(number))
                        one = self.word(self.areas.values, offset)
                        for place, row in enumerate(rows, number * width):
                            found[place] = self.plus(found[place], one, row)
                return found

            places = []
            for number in range(at_once):
                for vector in range(width):
                    row = k.sum(k.product(k.sum(first, k.integer(vector)), k.integer(self.dim)), start)
                    places.append(k.product(k.sum(row, k.integer(number)), k.integer(LANES)))
            sums = [k.load(self.areas.outputs, place, F32, LANES) for place in places]
            num_steps = k.product(num_paired, k.integer(PAIRED // self.per_word // _UNROLLED))
            for place, total in zip(places, k.fold(num_steps, sums, step), strict=True):
                k.store(total, self.areas.outputs, place, F32, LANES)


class _Pairs(_Packed, _Spread):
    """Packed values: [numbers / 8, KEYS / 2, 8] pairs of keys, so that eight sums read one stretch."""

    at_once = 8
    per_word = 2

    def store_values(self, paired: Any, start: Any, pairs: Sequence[Any]) -> None:
        k = self.k
        for number, pair in enumerate(pairs):
            row = k.sum(k.product(paired, k.integer(LANES)), k.integer(number))
            for half, words in enumerate(k.halves(pair, LANES)):
                column = k.sum(start, k.integer(half * 8))
                at = k.sum(k.product(column, k.integer(KEYS // 2)), k.product(row, k.integer(8)))
                k.store(words, self.areas.values, at, I32, 8)

    def key(self, cached: Any, group: Any, /) -> tuple[Any, Any]:
        k = self.k
        sub, half = k.builder.lshr(group, k.integer(1)), k.builder.and_(group, k.integer(1))
        start = k.builder.lshr(k.load(self.areas.subs, sub, I64), k.integer(1))
        return cached, k.sum(start, k.product(half, k.integer(self.at_once * self.dim // 2)))

    def word(self, address: Any, offset: Any) -> Any:
        k = self.k
        empty = ir.Constant(_WORDS, ir.Undefined)
        first = k.builder.insert_element(empty, k.load(address, offset, I32), ir.Constant(I32, 0))
        return k.builder.shuffle_vector(first, empty, _words(0))

    def row(self, address: Any, offset: Any) -> Any:
        return self.k.load(address, offset, I32, LANES)

    def plus(self, total: Any, left: Any, right: Any) -> Any:
        pairs = (self.k.builder.bitcast(each, _PAIRS) for each in (left, right))
        return self.k.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, *pairs)

    def weights(self) -> Any:
        return self.areas.weights


class _Floats(_Spread):
    """Packed values: [numbers / 8, KEYS, 8] float32; weights take the scores' place."""

    per_word = 1

    def __init__(self, kernel: Kernel, areas: Areas, head_dim: int, kind: str, *, wide: bool) -> None:
        self.k, self.areas, self.dim, self.kind = kernel, areas, head_dim, kind
        self.at_once = 8 if wide else 2

    def pack_queries(self, vector: Any, rows: Sequence[Any], address: Any) -> None:
        k = self.k
        start = k.product(vector, k.integer(self.dim * LANES))
        for part in range(self.dim // LANES):
            offsets = [k.sum(row, k.integer(part * LANES)) for row in rows]
            floats = [k.load_floats(address, each, LANES, self.kind) for each in offsets]
            for place, column in enumerate(k.transposed(floats)):
                at = k.sum(start, k.integer((part * LANES + place) * LANES))
                k.store(column, self.areas.queries, at, F32, LANES)

    def pack_block(self, cache: tuple[Any, Any], num_subs: Any, num_valid: Any) -> None:
        k, dim = self.k, self.dim
        num_keys = k.product(k.builder.and_(k.sum(num_subs, k.integer(1)), k.integer(-2)), k.integer(SUB))
        with k.loop(k.integer(0), num_keys) as key:
            sub, within = k.builder.lshr(key, k.integer(4)), k.builder.and_(key, k.integer(15))
            valid = k.builder.icmp_signed("<", key, num_valid)
            base = k.sum(k.load(self.areas.subs, sub, I64), k.product(within, k.integer(dim)))
            row = k.builder.select(valid, base, k.load(self.areas.subs, k.integer(0), I64))
            for part in range(0, dim, LANES):
                at = k.sum(row, k.integer(part))
                floats = k.load_floats(cache[0], at, LANES, self.kind)
                k.store(floats, self.areas.keys, k.sum(k.product(key, k.integer(dim)), k.integer(part)), F32, LANES)
                loaded = k.load_floats(cache[1], at, LANES, self.kind)
                value = k.builder.select(valid, loaded, k.constant(0.0, LANES))
                for half, floats in enumerate(k.halves(value, LANES)):
                    to = k.sum(k.product(key, k.integer(8)), k.integer((part + half * 8) * KEYS))
                    k.store(floats, self.areas.values, to, F32, 8)

    def store_weights(self, vector: int, pair: Any, weights: Sequence[Any]) -> None:
        k = self.k
        for each, weight in enumerate(weights):
            place = k.sum(k.product(pair, k.integer(2 * LANES)), k.integer((vector * KEYS + each) * LANES))
            k.store(weight, self.areas.scores, place, F32, LANES)

    def key(self, _cached: Any, group: Any, /) -> tuple[Any, Any]:
        return self.areas.keys, self.k.product(group, self.k.integer(self.at_once * self.dim))

    def word(self, address: Any, offset: Any) -> Any:
        return self.k.spread(self.k.load(address, offset, F32), LANES)

    def row(self, address: Any, offset: Any) -> Any:
        return self.k.load(address, offset, F32, LANES)

    def plus(self, total: Any, left: Any, right: Any) -> Any:
        return self.k.plus(total, self.k.times(left, right))

    def weights(self) -> Any:
        return self.areas.scores


@contextmanager
def tiles(kernel: Kernel, form: Form, area: Any) -> Iterator[None]:
    """Around code that uses tiles: sets their shape, and brings back whatever shape they had (oneDNN's)."""
    if form is not Form.AMX:
        yield
        return
    k = kernel
    before, ours = (k.builder.inttoptr(k.sum(area, k.integer(at)), I8.as_pointer()) for at in (0, 64))
    k.call("llvm.x86.sttilecfg", ir.VoidType(), before)
    for at in range(0, 64, 8):
        k.store(k.integer(0), k.sum(area, k.integer(64)), k.integer(at // 8), I64)
    k.store(_i8(1), k.sum(area, k.integer(64)), k.integer(0), I8)
    for tile in range(8):  # 64 bytes in each of 16 rows
        k.store(_i8(64), k.sum(area, k.integer(64)), k.integer(16 + 2 * tile), I8)
        k.store(_i8(16), k.sum(area, k.integer(64)), k.integer(48 + tile), I8)
    k.call("llvm.x86.ldtilecfg", ir.VoidType(), ours)
    yield
    k.call("llvm.x86.ldtilecfg", ir.VoidType(), before)


def _words(value: int) -> Any:
    return ir.Constant(_WORDS, [ir.Constant(I32, value)] * LANES)


def _i8(value: int) -> Any:
    return ir.Constant(I8, value)
